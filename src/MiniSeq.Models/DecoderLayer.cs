using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>What the rows of one pass have in common.</summary>
/// <param name="Positions">[rows] int64.</param>
/// <param name="MaxLength">One more than the largest position.</param>
/// <param name="Rotary">Tables of the rotary embedding.</param>
/// <param name="ChunkRows">Rows of a mini-sequence.</param>
/// <param name="Dropout">All rows, for adapters with dropout; null drops nothing.</param>
internal sealed record RowContext(Tensor Positions, long MaxLength, RotaryEmbedding Rotary, long ChunkRows, DropoutRows? Dropout = null);

/// <summary>What a layer keeps from forward for backward: its input, and more where memory allows. Belongs to no dispose scope.</summary>
internal sealed class LayerRecord(Tensor input, RecomputePolicy policy) : IDisposable
{
    private readonly List<Tensor> _owned = [input.DetachFromDisposeScope()];

    public Tensor Input { get; } = input;

    /// <summary>Output and log-sum-exp.</summary>
    public Attention.Result? Attention { get; private set; }

    /// <summary>Queries, keys and values after rotation, [rows, heads, D].</summary>
    public (Tensor Q, Tensor K, Tensor V)? Heads { get; private set; }

    /// <summary>r = x + W_o attention, [rows, d].</summary>
    public Tensor? Residual { get; private set; }

    /// <summary>Gate and up of the MLP, [rows, I].</summary>
    public (Tensor Gate, Tensor Up)? Mlp { get; private set; }

    public void KeepAttention(Attention.Result result)
    {
        if (policy != RecomputePolicy.Full) Attention = result.DetachFromDisposeScope();
    }

    public void KeepHeads(Tensor q, Tensor k, Tensor v)
    {
        if (policy == RecomputePolicy.None) Heads = (Own(q), Own(k), Own(v));
    }

    public void MakeRoom(long intermediate)
    {
        if (policy != RecomputePolicy.None) return;
        Tensor Wide() => Own(empty([Input.size(0), intermediate], Input.dtype, Input.device));
        (Residual, Mlp) = (Own(empty_like(Input)), (Wide(), Wide()));
    }

    public void Dispose()
    {
        foreach (var t in _owned) t.Dispose();
        Attention?.Dispose();
    }

    private Tensor Own(Tensor t)
    {
        _owned.Add(t.DetachFromDisposeScope());
        return t;
    }
}

/// <summary>
/// One decoder layer, y = r + MLP(norm₂(r)), r = x + W_o attention(norm₁(x)), as a forward/backward pair over rows of a packed batch.
/// </summary>
/// <remarks>
/// Everything but attention is row-wise and runs in mini-sequences; only q, k, v and attention's output exist for all rows at once.
/// Backward recomputes from x. The MLP's output is never needed again, so each of its tiles goes forward and backward in one visit:
/// the cost is that of plain recomputation. Weight gradients are added to <c>.grad</c>; the gradient of x replaces that of y in place.
/// </remarks>
internal sealed class DecoderLayer : nn.Module
{
    private readonly RmsNorm _norm1;
    private readonly RmsNorm _norm2;
    private readonly Projection _q;
    private readonly Projection _k;
    private readonly Projection _v;
    private readonly Projection _o;
    private readonly GatedMlp _mlp;
    private readonly DecoderConfig _config;

    public DecoderLayer(DecoderConfig config, ScalarType dtype, Device? device) : base(nameof(DecoderLayer))
    {
        _config = config;
        long d = config.HiddenSize, queries = (long)config.NumAttentionHeads * config.HeadDim, keys = (long)config.NumKeyValueHeads * config.HeadDim;
        _norm1 = new RmsNorm(d, config.RmsNormEps, dtype, device);
        _norm2 = new RmsNorm(d, config.RmsNormEps, dtype, device);
        _q = new Projection(d, queries, config.AttentionBias, dtype, device);
        _k = new Projection(d, keys, config.AttentionBias, dtype, device);
        _v = new Projection(d, keys, config.AttentionBias, dtype, device);
        _o = new Projection(queries, d, config.AttentionBias, dtype, device);
        _mlp = new GatedMlp(d, config.IntermediateSize, config.HiddenAct, config.MlpBias, dtype: dtype, device: device);
        register_module("self_attn", new ModuleGroup(("q_proj", _q), ("k_proj", _k), ("v_proj", _v), ("o_proj", _o)));
        register_module("mlp", _mlp);
        register_module("input_layernorm", _norm1);
        register_module("post_attention_layernorm", _norm2);
    }

    /// <summary>Factor of Q Kᵀ.</summary>
    public double AttentionScale => 1 / Math.Sqrt(_config.HeadDim);

    /// <summary>y for x, both [rows, d]; records no graph.</summary>
    /// <param name="x">Left as it is, unless <paramref name="inPlace"/>.</param>
    /// <param name="rows">Positions and chunk size.</param>
    /// <param name="attend">Attention's output [rows, Hq, D] from q [rows, Hq, D] and k, v [rows, Hkv, D].</param>
    /// <param name="record">What backward will need; null for inference.</param>
    /// <param name="inPlace">y takes the memory of x.</param>
    public Tensor Forward(Tensor x, RowContext rows, Func<Tensor, Tensor, Tensor, Tensor> attend, LayerRecord? record = null, bool inPlace = false)
    {
        using var scope = NewDisposeScope();
        Tensor output;
        using (NewDisposeScope())
        {
            var (q, k, v) = QueryKeyValue(x, rows);
            output = attend(q, k, v).MoveToOuterDisposeScope();
            record?.KeepHeads(q, k, v);
        }
        record?.MakeRoom(_config.IntermediateSize);
        var attention = output.flatten(1);
        var y = inPlace ? x : empty_like(x);
        Chunking.ForEach(x.size(0), rows.ChunkRows, (start, count) =>
        {
            Tensor At(Tensor t) => t.narrow(0, start, count);
            var r = AfterAttention(At(x), At(attention), rows.Dropout?.From(start));
            if (record?.Residual is { } kept) At(kept).copy_(r);
            var mlp = _mlp.ForwardChunk(_norm2.forward(r), record?.Mlp is var (gate, up) ? (At(gate), At(up)) : null, rows.Dropout?.From(start));
            At(y).copy_(mlp.add_(r));
        });
        return inPlace ? x : y.MoveToOuterDisposeScope();
    }

    /// <summary>Turns the gradient of y [rows, d] into that of x, in its own memory, and accumulates the weights' gradients.</summary>
    /// <param name="record">Forward's; the caller disposes it.</param>
    /// <param name="gradient">dy when called, dx when done.</param>
    /// <param name="rows">As in forward.</param>
    /// <param name="lengths">Rows of each document.</param>
    public void Backward_(LayerRecord record, Tensor gradient, RowContext rows, IReadOnlyList<long> lengths)
    {
        using var scope = NewDisposeScope();
        Tensor dq, dk, dv;
        using (NewDisposeScope())
        {
            var (q, k, v) = record.Heads ?? QueryKeyValue(record.Input, rows);
            var attention = record.Attention ?? Attention.Forward(q, k, v, lengths, AttentionScale);
            var dOutput = BackwardAfterAttention(record, gradient, attention.Output, rows);
            (dq, dk, dv) = Attention.Backward(dOutput, q, k, v, attention, lengths, AttentionScale);
            foreach (var t in new[] { dq, dk, dv }) t.MoveToOuterDisposeScope();
        }
        BackwardBeforeAttention(record.Input, gradient, dq, dk, dv, rows);
    }

    /// <summary>The layer as a user of TorchSharp would write it, recorded by autograd: x [batch, S, d], positions 0..S−1.</summary>
    public Tensor Plain(Tensor x, RotaryEmbedding rotary)
    {
        using var scope = NewDisposeScope();
        var (cos, sin) = rotary.Rows(arange(x.size(1), ScalarType.Int64, x.device), x.size(1));
        var h = _norm1.call(x);
        var q = RotaryEmbedding.Rotate(Heads(_q.call(h)), cos, sin).transpose(1, 2);
        var k = RotaryEmbedding.Rotate(Heads(_k.call(h)), cos, sin).transpose(1, 2);
        var v = Heads(_v.call(h)).transpose(1, 2);
        var attention = Attention.Plain(q, k, v, AttentionScale).transpose(1, 2).flatten(2);
        var r = x + _o.call(attention);
        var n = _norm2.call(r);
        var gate = _mlp.GateProj.call(n);
        var act = _config.HiddenAct == Activation.Silu ? nn.functional.silu(gate) : nn.functional.gelu(gate, TorchSharp.Modules.GELU.Approximate.tanh);
        return (r + _mlp.DownProj.call(act * _mlp.UpProj.call(n))).MoveToOuterDisposeScope();
    }

    // norm → q, k, v → rotary, a mini-sequence at a time.
    private (Tensor Q, Tensor K, Tensor V) QueryKeyValue(Tensor x, RowContext rows)
    {
        Tensor All(int heads) => empty([x.size(0), heads, _config.HeadDim], x.dtype, x.device);
        var (q, k, v) = (All(_config.NumAttentionHeads), All(_config.NumKeyValueHeads), All(_config.NumKeyValueHeads));
        Chunking.ForEach(x.size(0), rows.ChunkRows, (start, count) =>
        {
            var h = _norm1.forward(x.narrow(0, start, count));
            var (cos, sin) = rows.Rotary.Rows(rows.Positions.narrow(0, start, count), rows.MaxLength);
            var dropout = rows.Dropout?.From(start);
            var (qc, kc) = (q.narrow(0, start, count), k.narrow(0, start, count));
            RotaryEmbedding.Rotate_(qc.copy_(Heads(_q.forward(h, dropout))), cos, sin);
            RotaryEmbedding.Rotate_(kc.copy_(Heads(_k.forward(h, dropout))), cos, sin);
            v.narrow(0, start, count).copy_(Heads(_v.forward(h, dropout)));
        });
        return (q, k, v);
    }

    private Tensor AfterAttention(Tensor x, Tensor attention, DropoutRows? dropout) => _o.forward(attention, dropout).add_(x);

    // dy → dr in place, and the gradient of attention's output.
    private Tensor BackwardAfterAttention(LayerRecord record, Tensor gradient, Tensor output, RowContext rows)
    {
        var dOutput = empty_like(output);
        var (attention, dAttention) = (output.flatten(1), dOutput.flatten(1));
        Chunking.ForEach(gradient.size(0), rows.ChunkRows, (start, count) =>
        {
            Tensor At(Tensor t) => t.narrow(0, start, count);
            var dropout = rows.Dropout?.From(start);
            var (a, dr) = (At(attention), At(gradient));
            var r = record.Residual is { } kept ? At(kept) : AfterAttention(At(record.Input), a, dropout);
            var mlp = _mlp.BackwardChunk(_norm2.forward(r), dr, record.Mlp is var (gate, up) ? (At(gate), At(up)) : null, dropout: dropout)!;
            dr.add_(_norm2.Backward(r, mlp)); // dr = dy + the way through the MLP
            _o.AccumulateGradients(a, dr, dropout);
            At(dAttention).copy_(_o.InputGradient(dr, dropout));
        });
        return dOutput;
    }

    // dr → dx in place, from the gradients of q, k and v.
    private void BackwardBeforeAttention(Tensor x, Tensor gradient, Tensor dq, Tensor dk, Tensor dv, RowContext rows) =>
        Chunking.ForEach(x.size(0), rows.ChunkRows, (start, count) =>
        {
            var xc = x.narrow(0, start, count);
            var h = _norm1.forward(xc);
            var (cos, sin) = rows.Rotary.Rows(rows.Positions.narrow(0, start, count), rows.MaxLength);
            sin.neg_(); // the gradient of a rotation turns back
            RotaryEmbedding.Rotate_(dq.narrow(0, start, count), cos, sin);
            RotaryEmbedding.Rotate_(dk.narrow(0, start, count), cos, sin);
            var dropout = rows.Dropout?.From(start);
            Tensor? dh = null;
            foreach (var (projection, all) in new[] { (_q, dq), (_k, dk), (_v, dv) })
            {
                var d = all.narrow(0, start, count).flatten(1);
                projection.AccumulateGradients(h, d, dropout);
                if (dh is null) dh = projection.InputGradient(d, dropout);
                else projection.AddInputGradient(dh, d, dropout);
            }
            gradient.narrow(0, start, count).add_(_norm1.Backward(xc, dh!));
        });

    private Tensor Heads(Tensor t) => t.view([.. t.shape[..^1], -1, _config.HeadDim]);
}

/// <summary>A named group of modules that computes nothing: it gives parameters their Hugging Face prefix.</summary>
internal sealed class ModuleGroup : nn.Module
{
    public ModuleGroup(params (string Name, nn.Module Module)[] children) : base(nameof(ModuleGroup))
    {
        foreach (var (name, module) in children) register_module(name, module);
    }
}
