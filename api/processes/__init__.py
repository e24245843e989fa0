"""One server of several processes: the first one is the whole server, the others answer its hot routes.

All connections come to the first process. One whose first request is hot may go on to another process, as an open
socket: who has the fewest gets it. What comes on it later and is not hot takes the connection back to the first
process, which alone has the registry, WebSockets, events, metrics and all that is counted. So an answer never
depends on the process that happens to have the connection.
"""
