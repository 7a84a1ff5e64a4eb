"""trackstar: which training examples made this language model say that?"""
