"""Twenty training steps on the same global batches, by as many processes as torchrun starts.

    torchrun --standalone --nproc-per-node=2 tests/distributed_steps.py MODE LOSS OUTPUT.pth

MODE is "ours" (train.py's way), or one of two ways that change the method, for the tests to tell apart:
"local": every process builds the hypergraph of its own share; "unscaled": embeddings are gathered, but the gradient
that comes back is not scaled to the average that DistributedDataParallel takes, as library wrappers leave it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import distributed
import flags
import net
import torch
import train


def main():
    mode, loss_name, output = sys.argv[1:]
    device = distributed.start(-1)
    assert device.type == "cpu"
    rank, count = distributed.processes()
    words = "--lr 1e-5 --lr-ds 1e-3 --optimizer sgd --embedding-size 16 --hgnn-hidden 8 --loss"
    args = flags.train_parser().parse([*words.split(), loss_name])[0]
    torch.manual_seed(0)
    network, criterion = net.build("resnet18", 16, "none", bn_freeze=True), train.make_criterion(6, args)
    network.set_backbone_trainable(True)
    optimizer = train.make_optimizer(network, criterion, args)
    network.train()
    network.freeze_batchnorm_statistics()
    forward, loss_of = distributed.wrap(network, torch.device("cpu")), distributed.wrap(criterion, torch.device("cpu"))
    if mode == "unscaled":
        distributed._GatherEmbeddings.backward = staticmethod(lambda ctx, grad: grad[ctx.rows])
    batches = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(20):
        images = torch.randn(8, 3, 32, 32, generator=batches)
        labels = torch.randint(6, (8,), generator=batches)
        labels[:2] = 5  # a class that only the first process sees
        labels[2:] %= 5
        share = slice(rank * 8 // count, (rank + 1) * 8 // count)
        embeddings, labels = forward(images[share]), labels[share]
        if mode != "local":
            embeddings, labels = distributed.gather_batch(embeddings, labels)
        loss = loss_of(embeddings, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rank == 0:
        states = {"network": network.state_dict(), "criterion": criterion.state_dict()}
        torch.save({"losses": losses, **states}, output)
    distributed.stop()


if __name__ == "__main__":
    main()
