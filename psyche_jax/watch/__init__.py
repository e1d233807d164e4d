"""`psyche watch`: runs on a page of this machine while they are written.

`server` reads them and makes fragments of HTML from the pieces of the report; `watch.js` asks for them and puts them in
place. Nothing here starts JAX.
"""
