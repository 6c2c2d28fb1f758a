"""Object detection with Faster R-CNN on a pre-trained backbone."""
