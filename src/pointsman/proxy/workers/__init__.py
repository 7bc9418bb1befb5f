"""One scheduler, several processes that move bytes.

The scheduler's process keeps everything that is learned, counted or shown. A worker accepts connections,
parses requests, asks the scheduler over a unix socket where each goes, and tells it what became of it. What
a turn of the event loop brings is one message, so the more there is to do the less each request pays for
the way.
"""
