"""How results show themselves: in one line, as a table in a notebook, as labelled arrays, as pictures."""
