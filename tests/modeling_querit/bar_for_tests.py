"""A progress bar that writes down what it is told."""


class RecordingBar:
    """In place of tqdm: called like it, itself, with its options; then a context manager with `update`."""

    def __init__(self):
        self.options, self.events = {}, []

    def __call__(self, **options):
        self.options.update(options)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.events.append("closed")

    def update(self, count):
        self.events.append(count)
