"""Memory across a checkpoint: gathered from all processes, and shared out among as many as there are."""

import pytest
import torch

from hf_deq.training.memory import CarriedMemory


class Processes:
    """Stands in for accelerate: this process is one of several that hold the same."""

    def __init__(self, index, num):
        self.process_index, self.num_processes = index, num
        self.is_main_process, self.device = index == 0, torch.device("cpu")

    def gather(self, state):
        return torch.cat([state + index for index in range(self.num_processes)])


@pytest.mark.parametrize("num", [1, 2, 4])
def test_saved_rows_are_shared_out(num, tmp_path):
    saving = CarriedMemory(Processes(0, 2), pieces=2)
    saving.pieces = [(torch.zeros(2, 3, 4), torch.zeros(2, 1, 5)), (torch.full((2, 3, 4), 10.0), torch.zeros(2, 1, 5))]
    saving.save(tmp_path)
    loaded = [CarriedMemory(Processes(index, num), pieces=2) for index in range(num)]
    for memory in loaded:
        memory.load(tmp_path)
    for piece, expected in enumerate(([0, 0, 1, 1], [10, 10, 11, 11])):
        states, inputs = (torch.cat([memory.pieces[piece][part] for memory in loaded]) for part in (0, 1))
        assert states[:, 0, 0].tolist() == expected and states.shape == (4, 3, 4) and inputs.shape == (4, 1, 5)


def test_nothing_is_saved_where_nothing_is_remembered(tmp_path):
    memory = CarriedMemory(Processes(0, 1), pieces=1)
    memory.save(tmp_path)
    assert not list(tmp_path.iterdir())
    memory.pieces = [(torch.zeros(1, 1, 1),)]
    memory.load(tmp_path)
    assert memory.pieces == [None]
