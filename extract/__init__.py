"""Videos through ffmpeg and frozen backbones into a feature store; captions through a frozen text encoder."""
