"""The side of the adapter that calls borg: a process of one thread, run by borg's own interpreter.

Nothing here imports anything but the standard library (of Python 3.8 and later) and borg (1.2 and 1.4).

`client.py` starts it as `python worker/__main__.py DESCRIPTOR` and talks to it over standard input and output, one
JSON object a line, a reply to each request. Contents never go through those pipes: they lie in shared memory
(DESCRIPTOR, a memfd), which is cut into slots that only the parent gives out.

    -> {"repository": R, "lock_wait": SECONDS, "umask": OCTAL or "", "slot": BYTES}             greeting, once
    <- {"borg": VERSION}

    -> {"op": "list"}
    <- {"archives": [{"name": N, "comment": C}, ...]}               those of ours, oldest first

    -> {"op": "store", "archive": N, "volume": V, "comment": C, "compression": C, "checkpoint": SECONDS,
        "unit": BYTES, "bases": [N, ...]}
    <- {"ready": true}
    -> {"item": PATH, "size": BYTES}                                then its frames, for each item in turn
    -> {"runs": [[KIND, BYTES], ...], "slot": S or null}            KIND is data, zero or same, and then the number of
                                                                    the base follows; the bytes of all data runs of a
                                                                    frame lie in slot S, one after the other
    <- {"free": S}                                                  for every frame that has a slot
    -> {"end": true}
    <- {"stored": BYTES}

    -> {"op": "open", "archive": N, "items": [PATH, ...]}
    <- {"unit": BYTES, "sizes": {PATH: BYTES, ...}}
    -> {"read": ID, "item": PATH, "runs": [[FIRST, COUNT], ...], "slot": S}     chunk numbers
    <- {"read": ID}                                                 the chunks lie in slot S, one after the other
    <- {"read": ID, "error": ..}                                    or could not be had; others may be asked for
    -> {"op": "close"}
    <- {"closed": true}

    -> {"op": "delete", "archives": [N, ...]}
    <- {"deleted": COUNT}

    <- {"error": {"kind": CLASS, "message": TEXT, "number": ERRNO or null}}     instead of a reply; the worker ends

The end of standard input means that the parent gave up or died, SIGTERM that somebody wants us gone: whatever was
begun is rolled back and the lock released. Borg's log goes to standard error, a JSON object a line.
"""
