"""The HTTP server: OpenAI's and Anthropic's APIs over one engine.

    body ── requests.py ──► Ask ── conversation.py ──► engine ──► events ── chat.py, completions.py, responses.py,
                                                                            messages.py ──► that API's events or object

`app.py` puts them on their paths; `page.html` is the chat page.
"""
