using MiniSeq.Layers;
using TorchSharp.Modules;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class MiniSequenceTests
{
    private sealed class FeedForward : nn.Module<Tensor, Tensor>
    {
        private readonly Linear up = nn.Linear(6, 24);
        private readonly Linear down = nn.Linear(24, 6);

        public FeedForward() : base(nameof(FeedForward)) => RegisterComponents();

        public override Tensor forward(Tensor input) => down.call(nn.functional.gelu(up.call(input)));
    }

    private sealed class Block : nn.Module<Tensor, Tensor>
    {
        private readonly nn.Module<Tensor, Tensor> ffn = new FeedForward();
        private readonly LayerNorm norm = nn.LayerNorm(6);

        public Block() : base(nameof(Block)) => RegisterComponents();

        public override Tensor forward(Tensor input) => input + ffn.call(norm.call(input));
    }

    private sealed class Model : nn.Module<Tensor, Tensor>
    {
        private readonly ModuleList<nn.Module<Tensor, Tensor>> blocks = nn.ModuleList<nn.Module<Tensor, Tensor>>(new Block(), new Block());
        private readonly Sequential tail = nn.Sequential(("ffn", new FeedForward()), ("out", nn.Linear(6, 3)));

        public Model() : base(nameof(Model)) => RegisterComponents();

        public override Tensor forward(Tensor input) => tail.call(blocks.Aggregate(input, (x, b) => b.call(x)));
    }

    [Fact]
    public void OneCallAppliesItAndNothingElseChanges()
    {
        using var scope = NewDisposeScope();
        using var model = new Model();
        var x = randn(2, 7, 6, requires_grad: true);
        var plain = model.call(x);
        plain.pow(2).sum().backward();
        var (wantX, want, names) = (x.grad!.clone(), GradientsOf(model), model.state_dict().Keys.ToList());
        ClearGradients(model);
        x.grad = null;

        var replaced = MiniSequence.ApplyTo(model, (_, child) => child is FeedForward, chunkSize: 3);
        Assert.Equal(["blocks.0.ffn", "blocks.1.ffn", "tail.ffn"], replaced);
        Assert.Equal(names, model.state_dict().Keys);
        var y = model.call(x);
        Close(y, plain, 1e-6);
        y.pow(2).sum().backward();
        Close(x.grad, wantX, 1e-6);
        foreach (var (name, gradient) in GradientsOf(model)) Close(gradient, want[name], 1e-5);
        Assert.Empty(MiniSequence.ApplyTo(model, (_, child) => child is FeedForward)); // a second call finds nothing left
    }

    [Fact]
    public void ABlockAsAWholeCanBeReplacedInAModuleList()
    {
        using var scope = NewDisposeScope();
        using var model = new Model();
        Assert.Equal(["blocks.0", "blocks.1"], MiniSequence.ApplyTo(model, (_, child) => child is Block, 2));
        Assert.Equal([5L, 3], model.call(randn(5, 6)).shape);
    }

    [Fact]
    public void StateDictsAreInterchangeable()
    {
        using var plain = new FeedForward();
        using var wrapped = new MiniSequence(new FeedForward(), 2);
        Assert.Equal(plain.state_dict().Keys, wrapped.state_dict().Keys);
        wrapped.load_state_dict(plain.state_dict());
        using var x = randn(5, 6);
        using var a = plain.call(x);
        using var b = wrapped.call(x);
        Close(b, a, 1e-6);
    }

    [Fact]
    public void TrainAndEvalReachTheWrappedModule()
    {
        using var wrapped = new MiniSequence(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.9)), 2);
        using var x = ones(50, 6);
        wrapped.eval();
        using var a = wrapped.call(x);
        using var b = wrapped.call(x);
        Close(a, b, 0);
        wrapped.train();
        using var c = wrapped.call(x);
        Assert.True(Difference(c, a) > 0);
    }

    private sealed class Narrow : nn.Module<Tensor, Tensor>
    {
        private readonly FeedForward ffn = new();

        public Narrow() : base(nameof(Narrow)) => RegisterComponents();

        public override Tensor forward(Tensor input) => ffn.call(input);
    }

    [Fact]
    public void AFieldOfANarrowerTypeIsRefusedWithWhatToDo()
    {
        using var model = new Narrow();
        var error = Assert.Throws<InvalidOperationException>(() => MiniSequence.ApplyTo(model, (_, child) => child is FeedForward));
        Assert.Contains("declare its field as Module<Tensor, Tensor>", error.Message);
    }

    [Fact]
    public void AModuleThatIsNotRowWiseIsRefused()
    {
        using var scope = NewDisposeScope();
        using var wrapped = new MiniSequence(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, [1, -1])), 2);
        Assert.Contains("not row-wise", Assert.Throws<InvalidOperationException>(() => wrapped.call(randn(4, 3))).Message);
    }
}
