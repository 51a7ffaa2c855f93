"""Image classification (XCiT, section 4.1), with hard distillation."""
