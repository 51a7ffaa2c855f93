"""Fine-tuning of a backbone: classification, semantic segmentation, detection with masks."""
