"""Learning from generated images: a second modality of CLIP, aligned, trained on, and used on real images."""


def __getattr__(name: str) -> str:
    """``__version__``, looked up when it is asked for: nothing is imported before ``python -m`` has mended its path."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gmail_lightning")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"
