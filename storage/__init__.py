"""Objects in memory, in a folder or in a bucket, behind one small asynchronous interface."""
