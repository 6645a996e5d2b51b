using MiniSeq.Layers;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class LinearCrossEntropyTests
{
    [Theory]
    [InlineData(1)]
    [InlineData(3)]
    [InlineData(100)]
    public void ChunkedEqualsPlain(int chunk)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(2);
        using var head = new Projection(5, 13, bias: true, ScalarType.Float64);
        var h = randn(2, 7, 5, dtype: ScalarType.Float64, requires_grad: true);
        var labels = randint(0, 13, [2, 7], ScalarType.Int64);
        labels[0, 3] = -100;
        labels[1, 6] = -100;

        var plain = nn.functional.cross_entropy(head.call(h).view(-1, 13), labels.view(-1), reduction: nn.Reduction.Sum);
        (plain * 0.3).backward();
        var (wantH, want) = (h.grad!.clone(), GradientsOf(head));
        ClearGradients(head);
        h.grad = null;

        using var loss = LinearCrossEntropy.Loss(h, head, labels, chunk);
        Assert.Equal(12, loss.TokenCount);
        Close(loss.LossSum, plain, 1e-12);
        (loss.LossSum * 0.3).backward();
        Close(h.grad, wantH, 1e-12);
        foreach (var (name, gradient) in GradientsOf(head)) Close(gradient, want[name], 1e-12);
    }

    [Fact]
    public void NoValidLabelGivesLossZeroAndZeroGradients()
    {
        using var scope = NewDisposeScope();
        using var head = new Projection(5, 13);
        var h = randn(4, 5, requires_grad: true);
        using var loss = LinearCrossEntropy.Loss(h, head, full([4], -100L));
        loss.LossSum.backward();
        Assert.Equal((0.0, 0L, 0.0), (loss.LossSum.item<double>(), loss.TokenCount, loss.Mean));
        Assert.Equal(0, h.grad!.abs().max().item<float>());
        Assert.Equal(0, head.Weight.grad!.abs().max().item<float>());
    }

    [Fact]
    public void AFrozenHeadGetsNoGradient()
    {
        using var scope = NewDisposeScope();
        using var head = new Projection(5, 13);
        head.Weight.requires_grad = false;
        var h = randn(4, 5, requires_grad: true);
        using var loss = LinearCrossEntropy.Loss(h, head, tensor([1L, 2, 3, -100]));
        loss.LossSum.backward();
        Assert.Null(head.Weight.grad);
        Assert.Equal(0, h.grad![3].abs().max().item<float>());
    }

    [Fact]
    public void WrongLabelsAreNamed()
    {
        using var scope = NewDisposeScope();
        using var head = new Projection(5, 13);
        var h = randn(4, 5);
        Assert.Contains("Label 13", Assert.Throws<ArgumentException>(() => LinearCrossEntropy.Loss(h, head, tensor([1L, 2, 3, 13]))).Message);
        Assert.Contains("Label -1", Assert.Throws<ArgumentException>(() => LinearCrossEntropy.Loss(h, head, tensor([1L, 2, 3, -1]))).Message);
        Assert.Contains("do not fit", Assert.Throws<ArgumentException>(() => LinearCrossEntropy.Loss(h, head, tensor([1L, 2, 3]))).Message);
        Assert.Contains("Int64", Assert.Throws<ArgumentException>(() => LinearCrossEntropy.Loss(h, head, ones(4))).Message);
    }

    [Fact]
    public void ALossThatIsNeverWalkedLeaksNothingAndOneIsWalkedOnce()
    {
        using var head = new Projection(5, 13);
        using var h = randn(4, 5, requires_grad: true);
        using var labels = tensor([1L, 2, 3, 4]);
        int nodes = AliveNodes();
        LinearCrossEntropy.Loss(h, head, labels).Dispose();
        long tensors = Tensor.TotalCount;
        for (int i = 0; i < 10; i++) LinearCrossEntropy.Loss(h, head, labels).Dispose();
        Assert.Equal((tensors, nodes), (Tensor.TotalCount, AutogradNode.AliveCount)); // without a collection
        using var loss = LinearCrossEntropy.Loss(h, head, labels);
        loss.LossSum.backward(retain_graph: true);
        Assert.Contains("runs once", Assert.Throws<InvalidOperationException>(() => AutogradNode.Backward(loss.LossSum)).Message);
    }
}
