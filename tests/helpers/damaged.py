"""Files that are not what was written."""


def each_damage(folder):
    """Yield while each file of `folder` in turn has a bit flipped, its end cut off, or is gone; then it is whole."""
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            yield path
        path.write_bytes(whole)
