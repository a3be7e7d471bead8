"""The request bodies of the four APIs: each module's `read` checks one and returns an `Ask`.

A field that is known is checked; null counts as absent; a field that is not known is named in `Ask.ignored`, since
clients send many. What is known and cannot be done (`best_of`, images, a response in the background) is refused. Every
`read` raises ApiError, with the path of the value that is wrong.
"""
