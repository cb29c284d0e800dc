"""Rules of the packet filter, whoever made them.

watch  says when somebody takes rules out of tables that are watched
"""
