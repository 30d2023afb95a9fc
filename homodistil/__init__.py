"""homodistil: make a small Transformer out of a big one, a little at a time, in one DeepSpeed job."""

__version__ = "0.1.0"
