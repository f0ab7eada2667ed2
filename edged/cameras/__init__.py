"""The frames that cameras send: kept for a while, as received, until a job asks for some.

Nothing here decodes a picture. `hub` is what others use.
"""
