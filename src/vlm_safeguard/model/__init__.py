"""Vision-language models: loading, decoder, chat templates, text-only pass, fingerprint."""
