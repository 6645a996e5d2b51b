using MiniSeq.Layers;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class RecomputeTests
{
    private static nn.Module<Tensor, Tensor> Block(double dropout = 0) =>
        nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(dropout), nn.Linear(12, 6));

    [Theory]
    [InlineData(true, 0.0)]
    [InlineData(true, 0.5)]
    [InlineData(false, 0.5)]
    public void OnEqualsOff(bool inputNeedsGrad, double dropout)
    {
        using var scope = NewDisposeScope();
        using var block = Block(dropout);
        var x = randn(9, 6).requires_grad_(inputNeedsGrad);
        random.manual_seed(3);
        var plain = block.call(x);
        plain.pow(2).sum().backward();
        var (wantX, want, nextPlain) = (x.grad?.clone(), GradientsOf(block), rand(1).item<float>());
        ClearGradients(block);
        x.grad = null;

        foreach (bool asModule in new[] { true, false })
        {
            random.manual_seed(3);
            var y = asModule ? Recompute.Run(block, x) : Recompute.Run(block.call, x);
            y.pow(2).sum().backward();
            Close(y, plain, 0);
            Close(x.grad, wantX, 1e-6);
            foreach (var (name, gradient) in GradientsOf(block)) Close(gradient, want[name], 1e-6);
            Assert.Equal(nextPlain, rand(1).item<float>()); // backward left the random state as it found it
            ClearGradients(block);
            x.grad = null;
        }
    }

    [Fact]
    public void NestsToAnyDepth()
    {
        using var scope = NewDisposeScope();
        using var block = Block();
        var x = randn(9, 6, requires_grad: true);
        block.call(block.call(block.call(x))).sum().backward();
        var (wantX, want) = (x.grad!.clone(), GradientsOf(block));
        ClearGradients(block);
        x.grad = null;
        Recompute.Run(a => Recompute.Run(block, Recompute.Run(b => Recompute.Run(block, block.call(b)), a)), x).sum().backward();
        Close(x.grad, wantX, 1e-6);
        foreach (var (name, gradient) in GradientsOf(block)) Close(gradient, want[name], 1e-6);
    }

    [Fact]
    public void AnExceptionInBackwardIsADotNetExceptionAndTheEngineGoesOn()
    {
        using var scope = NewDisposeScope();
        int calls = 0;
        Tensor Faulty(Tensor t) => ++calls % 2 == 0 ? throw new InvalidDataException("second run") : t * 2;
        var x = randn(3, requires_grad: true);
        Assert.ThrowsAny<Exception>(() => Recompute.Run(Faulty, x).sum().backward());
        var error = Assert.Throws<InvalidDataException>(() => AutogradNode.Backward(Recompute.Run(Faulty, x).sum()));
        Assert.Equal("second run", error.Message);
        AutogradNode.Backward(Recompute.Run(t => t * 3, x).sum());
        Close(x.grad, full([3], 3f), 0);
    }

    [Fact]
    public void AnExceptionInForwardIsThrownAsItIs()
    {
        using var scope = NewDisposeScope();
        var x = randn(3, requires_grad: true);
        Assert.Throws<InvalidDataException>(() => Recompute.Run(_ => throw new InvalidDataException(), x));
        Assert.True(is_grad_enabled());
    }

    [Fact]
    public void BackwardTwiceIsRefusedClearly()
    {
        using var scope = NewDisposeScope();
        var x = randn(3, requires_grad: true);
        var loss = Recompute.Run(t => t * t, x).sum();
        loss.backward(retain_graph: true);
        Assert.Contains("backward runs once", Assert.Throws<InvalidOperationException>(() => AutogradNode.Backward(loss)).Message);
    }

    [Fact]
    public void NothingTrainedNothingRecorded()
    {
        using var scope = NewDisposeScope();
        using var block = Block();
        foreach (var p in block.parameters()) p.requires_grad = false;
        Assert.False(Recompute.Run(block, randn(2, 6)).requires_grad);
    }

    [Fact]
    public void KeepsOnlyTheInput()
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        using var scope = NewDisposeScope();
        var x = randn(1000, 64, requires_grad: true);
        static Tensor Chain(Tensor t) => t.sigmoid().tanh().sigmoid().tanh();
        long before = TensorMemory.LiveBytes;
        using var y = Recompute.Run(t => { using var s = NewDisposeScope(); return Chain(t).MoveToOuterDisposeScope(); }, x);
        Assert.InRange(TensorMemory.LiveBytes - before, 256_000, 300_000); // the output, and 5 kB of random state
    }

    [Fact]
    public void LongRunsLeakNothing()
    {
        using var block = Block(0.1);
        using var model = nn.Sequential(block);
        MiniSequence.ApplyTo(model, (name, _) => name == "0", 4);
        using var mlp = new GatedMlp(6, 10, chunkSize: 4);
        using var head = new Projection(6, 20);
        using var x = randn(10, 6);
        using var labels = randint(0, 20, [10], ScalarType.Int64);
        int nodes = AliveNodes();
        long tensors = 0;
        for (int step = 0; step < 300; step++)
        {
            using (NewDisposeScope())
            {
                using var loss = LinearCrossEntropy.Loss(Recompute.Run(model, mlp.call(x)), head, labels, 4);
                AutogradNode.Backward(loss.LossSum);
            }
            if (step == 20) tensors = Tensor.TotalCount;
        }
        Assert.Equal(nodes, AutogradNode.AliveCount);
        Assert.InRange(Tensor.TotalCount - tensors, long.MinValue, 3);
    }
}
