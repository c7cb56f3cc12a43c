"""One task a training stage: align, finetune, fuse."""
