"""The HTTP server: OpenAI's and Anthropic's APIs over one engine.

    body ── schemas/ ──► Ask ── conversation.py ──► engine ──► events ── replies/ ──► that API's events or object

`app.py` puts them on their paths; `page.py` gives the files of the chat page, in `page/`.
"""
