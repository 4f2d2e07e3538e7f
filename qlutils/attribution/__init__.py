"""How much each neuron contributes to an answer: integrated gradients and their quadrature."""
