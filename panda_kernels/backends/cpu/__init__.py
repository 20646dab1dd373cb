def load_error():
    return "x"
