"""The playground: a page in the browser that shows unguarded and guarded answers side by side."""
