"""The page at `/` of the control port: what an operator looks at.

`model.py` turns a life into plain values, `timeline.py`, `probes.py` and `words.py` help it,
`render.py` makes HTML of them, `routes.py` answers requests. No web framework but in the last.
"""
