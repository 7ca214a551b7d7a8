"""Machines that move to another home while they run: what two processes of ours say to each other, and in which order.

    source                                      target
    Hello: what it is, what it needs      ->    looks at all of it, refuses before anything is made
                                          <-    Wants: the image, or not
    the image, as an archive              ->    loads it
                                          <-    Ready: a QEMU waits, its disk is empty
    disk, memory, devices                 <->   (the machine runs on, and then stands still)
                                          <-    Loaded: all is there, nothing runs
    Go                                    ->    lets it run
                                          <-    Running, or Failed
    removes its own

One of the two runs, never both. Until Go the source alone may run it: whatever fails, it goes on there, and the target throws away what
it has. Go is given up with the machine: the source writes down that it did, says so once, and from then on lets its machine run again only
if the target says Failed. If nothing comes back it stands still and says so, since the target may run it; who knows better says `resume`.

messages.py   what is said           link.py     frames, channels and their pumping
transport.py  who is at the other    source.py   the machine that leaves
              end, and how it is     target.py   the machine that comes
              known
"""
