"""The OpenAI-compatible server, chat in the terminal and in the browser, and the crisis gate before both."""
