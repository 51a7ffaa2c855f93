"""Semantic segmentation with Semantic FPN and UperNet (XCiT, section 4.4)."""
