"""A model written as functions of JAX on a hundred clients, each hidden in the sum of all."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import fedveil as fv

PIXELS, DIGITS = load_digits(return_X_y=True)


def scores(arrays, inputs):
    return inputs @ arrays["weight"] + arrays["bias"]


def cross_entropy(outputs, targets):
    return -jax.nn.log_softmax(outputs)[jnp.arange(len(targets)), targets].mean()


@jax.jit
def step(arrays, inputs, targets, rate):
    slopes = jax.grad(lambda values: cross_entropy(scores(values, inputs), targets))(arrays)
    return jax.tree.map(lambda value, slope: value - rate * slope, arrays, slopes)


class Digits:
    simulated, num_clients = True, 100
    predict, loss = staticmethod(scores), staticmethod(cross_entropy)

    def arrays(self):
        return {"weight": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}

    def fit(self, arrays, inputs, targets, training):
        for _ in range(training.local_epochs):
            arrays = step(arrays, inputs, targets, training.learning_rate)
        return arrays

    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).mean()}

    def client_data(self, client):
        return PIXELS[client:1500:100] / 16, DIGITS[client:1500:100]

    def held_out(self):
        return PIXELS[1500:] / 16, DIGITS[1500:]


if __name__ == "__main__":
    privacy = fv.ClientCentral(target_delta=1e-3)
    run = fv.simulate(Digits(), privacy=privacy, num_rounds=20, local_epochs=5, learning_rate=1)
    print(run.metrics, run.epsilon)
