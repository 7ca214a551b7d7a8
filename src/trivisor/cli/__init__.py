"""The command line: a table of verbs, one file a verb, rendering apart.

    main.py      the entry: finds the verb, and turns every error into one line, a hint and an exit status
    table.py     the verbs: where each is, and its line of help
    options.py   options that verbs share, and what they mean
    render.py    tables, JSON, and the progress of long work
    attach.py    a command in a machine joined to our own standard streams
    verbs/       one file a verb

Exit status: that of the command that was run (128 + n for signal n); 125 for a failure of ours, 2 for a command
line that makes no sense, 130 after Ctrl-C.

Nothing heavy is imported before the verb is known: `trivisor --help` loads click and this folder's table only.
"""
