"""Object detection and instance segmentation with Mask R-CNN (XCiT, section 4.3)."""
