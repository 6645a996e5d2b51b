using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Runs any row-wise module in mini-sequences: y[rows] = module(x[rows]) a chunk at a time, with recomputation of each chunk in
/// backward, so memory holds the intermediates of one chunk. One line to apply: <c>new MiniSequence(module)</c>, or
/// <see cref="ApplyTo(nn.Module, Func{string, nn.Module, bool}, int)"/> for all matching children of a model.
/// </summary>
/// <remarks>
/// Row-wise means that a row of the output depends on the same row of the input and on nothing else: feed-forward blocks, norms,
/// projections; not attention, not batch norm. Parameter names and the state dict are the wrapped module's own. Dropout inside
/// draws one mask a chunk, the same in forward and backward.
/// </remarks>
public sealed class MiniSequence : nn.Module<Tensor, Tensor>
{
    private readonly nn.Module<Tensor, Tensor> _module;
    private readonly int _chunkSize;

    /// <summary>Wraps a module.</summary>
    /// <param name="module">Row-wise: [rows, in] to [rows, out]. It belongs to the wrapper from now on.</param>
    /// <param name="chunkSize">Rows of a mini-sequence, or <see cref="Chunking.Auto"/>: by the widest weight of the module.</param>
    public MiniSequence(nn.Module<Tensor, Tensor> module, int chunkSize = Chunking.Auto) : base(nameof(MiniSequence))
    {
        ArgumentOutOfRangeException.ThrowIfNegative(chunkSize);
        (_module, _chunkSize) = (module, chunkSize);
        // The wrapped module's own parts are registered here under their own names: the state dict stays what it was.
        foreach (var (name, child) in module.named_children()) register_module(name, child);
        foreach (var (name, parameter) in module.named_parameters(recurse: false)) register_parameter(name, (TorchSharp.Modules.Parameter)parameter);
        foreach (var (name, buffer) in module.named_buffers(recurse: false)) register_buffer(name, buffer);
    }

    /// <summary>The wrapped module.</summary>
    public nn.Module<Tensor, Tensor> Wrapped => _module;

    /// <summary>
    /// Replaces every child of a model, at any depth, for which <paramref name="matches"/>(full name, child) holds by its
    /// mini-sequence form. Returns the full names replaced.
    /// </summary>
    /// <exception cref="InvalidOperationException">A matching child is not a <c>Module&lt;Tensor, Tensor&gt;</c>, or sits in a field that cannot be replaced.</exception>
    public static IReadOnlyList<string> ApplyTo(nn.Module model, Func<string, nn.Module, bool> matches, int chunkSize = Chunking.Auto)
    {
        var replaced = new List<string>();
        Visit(model, "");
        return replaced;

        void Visit(nn.Module parent, string prefix)
        {
            foreach (var (name, child) in parent.named_children().ToArray())
            {
                string full = prefix + name;
                if (child is MiniSequence) continue;
                if (!matches(full, child))
                {
                    Visit(child, full + ".");
                    continue;
                }
                ModuleSlots.Replace(parent, name, child, old => new MiniSequence(old, chunkSize));
                replaced.Add(full);
            }
        }
    }

    /// <inheritdoc/>
    public override Tensor forward(Tensor input)
    {
        Tensor[] inputs = [input, .. parameters()];
        if (!is_grad_enabled() || !inputs.Any(i => i.requires_grad)) return ForwardAll(input, null);
        var random = new RandomStates();
        return AutogradNode.Apply(inputs, () => ForwardAll(input, random), [input], Backward(random), random);
    }

    // Not in forward, where its closure would hold the input, too.
    private Func<AutogradNode, Tensor?[], Tensor?[]> Backward(RandomStates random) => (node, gradients) =>
    {
        var result = new Tensor?[node.NeedsInputGrad.Count];
        if (gradients[0] is not { } dy) return result;
        using var x = node.Unpack(0);
        node.ReleaseSaved();
        result[0] = BackwardAll(x, dy, node.NeedsInputGrad[0], random);
        return result;
    };

    /// <inheritdoc/>
    public override void train(bool train = true)
    {
        base.train(train);
        _module.train(train);
    }

    private long ChunkRows(Tensor x) => Chunking.Rows(_chunkSize, x.size(0), Width(x), x.dtype);

    private long Width(Tensor x) => Math.Max(x.size(1), _module.parameters().Select(p => p.dim() == 0 ? 1 : p.size(0)).DefaultIfEmpty(1).Max());

    private Tensor ForwardAll(Tensor input, RandomStates? random)
    {
        using var scope = NewDisposeScope();
        var x = input.reshape(-1, input.size(-1));
        Tensor? y = null;
        Chunking.ForEach(Math.Max(1, x.size(0)), ChunkRows(x), (start, count) =>
        {
            random?.Add(RandomState.Capture(x.device));
            var rows = x.narrow(0, start, Math.Min(count, x.size(0)));
            var part = _module.call(rows);
            if (part.size(0) != rows.size(0))
                throw new InvalidOperationException($"{_module.GetName()} is not row-wise: {rows.size(0)} rows in, [{string.Join(", ", part.shape)}] out.");
            y ??= empty([x.size(0), part.size(-1)], part.dtype, part.device).MoveToOuterDisposeScope();
            y.narrow(0, start, part.size(0)).copy_(part);
        });
        return y!.view([.. input.shape[..^1], y.size(-1)]).MoveToOuterDisposeScope();
    }

    private Tensor? BackwardAll(Tensor input, Tensor gradient, bool needsInputGrad, RandomStates random)
    {
        using var scope = NewDisposeScope();
        var x = input.reshape(-1, input.size(-1));
        var dy = gradient.reshape(x.size(0), -1);
        var dx = needsInputGrad ? zeros_like(x) : null;
        long chunk = ChunkRows(x);
        Chunking.ForEach(x.size(0), chunk, (start, count) =>
        {
            var part = Recompute.Again(_module.call, x.narrow(0, start, count), dy.narrow(0, start, count), needsInputGrad, random[(int)(start / chunk)]);
            if (part is not null) dx!.narrow(0, start, count).copy_(part);
        });
        return dx?.view(input.shape).MoveToOuterDisposeScope();
    }

    /// <summary>One for each mini-sequence of a forward pass.</summary>
    private sealed class RandomStates : List<RandomState>, IDisposable
    {
        public void Dispose() => ForEach(r => r.Dispose());
    }
}
