"""Follows run folders and hands what is in them to trackers, from processes of their own: a run starts these processes
and waits for them a while at its end, and nothing that they do or fail to do reaches it."""
