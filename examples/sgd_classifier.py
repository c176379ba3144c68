"""A linear classifier of scikit-learn on a hundred clients, each hidden in the sum of all."""

from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

import fedveil as fv
from fedveil.tasks.adapters.sklearn import SklearnTask

pixels, digits = load_digits(return_X_y=True)
pixels /= 16
clients = [(pixels[n:1500:100], digits[n:1500:100]) for n in range(100)]
estimator = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1)
task = SklearnTask(estimator, clients, held_out=(pixels[1500:], digits[1500:]), simulated=True)
run = fv.simulate(task, privacy=fv.ClientCentral(target_delta=1e-3), num_rounds=20, local_epochs=5)
print(run.metrics, run.epsilon)
