"""What `hdlm bench` measures: each module times one thing against a named baseline in the same run."""
