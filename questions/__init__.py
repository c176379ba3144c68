"""Questions: rounds that ask clients instead of training, a person's questions, evaluations and the scaling of inputs."""
