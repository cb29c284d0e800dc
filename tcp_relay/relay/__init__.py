"""tcp-relay.

daemon      file tree, gateway and relay on one loop
follower    what the file tree says
gateway     the listeners on the gateway port
connection  one relayed connection, from accept to its end
relay       all of them, and their talk with krelay
link        the client side of the relay socket
"""
