using MiniSeq.Layers;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// One decoder layer, y = r + MLP(norm(r)), r = x + W_o attention(norm(x)), as a forward/backward pair over rows of a packed batch.
/// Gemma 2 has norms behind attention and MLP, too: r = x + norm(W_o attention(norm(x))), y = r + norm(MLP(norm(r))).
/// </summary>
/// <remarks>
/// Everything but attention is row-wise and runs in mini-sequences; only q, k, v and attention's output exist for all rows at once.
/// Backward recomputes from x. The MLP's output is never needed again (but for a norm behind it), so each of its tiles goes forward and backward
/// in one visit: the cost is that of plain recomputation. Weight gradients are added to <c>.grad</c>; the gradient of x replaces that of y in place.
/// </remarks>
internal sealed class DecoderLayer : nn.Module
{
    private readonly RmsNorm _attentionNorm;
    private readonly RmsNorm? _postAttentionNorm;
    private readonly RmsNorm _mlpNorm;
    private readonly RmsNorm? _postMlpNorm;
    private readonly Projection _q;
    private readonly Projection _k;
    private readonly Projection _v;
    private readonly Projection _o;
    private readonly RmsNorm? _qNorm;
    private readonly RmsNorm? _kNorm;
    private readonly GatedMlp _mlp;
    private readonly DecoderConfig _config;
    private readonly int? _window;

    public DecoderLayer(DecoderConfig config, int index, ScalarType dtype, Device? device) : base(nameof(DecoderLayer))
    {
        (_config, _window) = (config, config.WindowOf(index));
        long d = config.HiddenSize, queries = (long)config.NumAttentionHeads * config.HeadDim, keys = (long)config.NumKeyValueHeads * config.HeadDim;
        RmsNorm Norm(long width) => new(width, config.RmsNormEps, dtype, device, config.RmsNormUnitOffset);
        Projection Linear(long input, long output, bool bias) => Uninitialized.Projection(input, output, bias, dtype, device);
        _q = Linear(d, queries, config.QkvBias);
        _k = Linear(d, keys, config.QkvBias);
        _v = Linear(d, keys, config.QkvBias);
        _o = Linear(queries, d, config.OutputBias);
        long inner = config.IntermediateSize;
        _mlp = new GatedMlp(Linear(d, inner, config.MlpBias), Linear(d, inner, config.MlpBias), Linear(inner, d, config.MlpBias), config.HiddenAct);
        (_attentionNorm, _mlpNorm) = (Norm(d), Norm(d));
        if (config.QkNorm) (_qNorm, _kNorm) = (Norm(config.HeadDim), Norm(config.HeadDim));
        if (config.PostNorms) (_postAttentionNorm, _postMlpNorm) = (Norm(d), Norm(d));
        Register();
    }

    // Under Hugging Face's names: with two norms post_attention_layernorm is the one before the MLP, with four the one behind attention.
    private void Register()
    {
        var attention = new ModuleGroup(("q_proj", _q), ("k_proj", _k), ("v_proj", _v), ("o_proj", _o));
        if (_qNorm is not null && _kNorm is not null)
        {
            attention.register_module("q_norm", _qNorm);
            attention.register_module("k_norm", _kNorm);
        }
        register_module("self_attn", attention);
        register_module("mlp", _mlp);
        register_module("input_layernorm", _attentionNorm);
        register_module("post_attention_layernorm", _postAttentionNorm ?? _mlpNorm);
        if (_postMlpNorm is null) return;
        register_module("pre_feedforward_layernorm", _mlpNorm);
        register_module("post_feedforward_layernorm", _postMlpNorm);
    }

    /// <summary>Attention of a packed batch, as the layer has it.</summary>
    public Attention.Result Attend(Tensor q, Tensor k, Tensor v, IReadOnlyList<long> lengths, WantedRows? wanted = null) =>
        Attention.Forward(q, k, v, lengths, _config.AttentionScale, _window, _config.AttnLogitSoftcapping, wanted?.Lengths);

    /// <summary>The same for new rows of one text against all of its rows.</summary>
    public Tensor AttendWithCache(Tensor q, Tensor k, Tensor v) => Attention.WithCache(q, k, v, _config.AttentionScale, _window, _config.AttnLogitSoftcapping);

    /// <summary>y for x [rows, d]; records no graph.</summary>
    /// <param name="x">Left as it is, unless <paramref name="inPlace"/>.</param>
    /// <param name="rows">Positions and chunk size.</param>
    /// <param name="attend">Attention's output [wanted, Hq, D] from q [wanted, Hq, D] and k, v [rows, Hkv, D].</param>
    /// <param name="record">What backward will need; null for inference.</param>
    /// <param name="inPlace">y takes the memory of x, where all rows are wanted.</param>
    /// <param name="wanted">Rows that y is wanted of: queries, output projection and MLP run on those alone; null is all.</param>
    /// <returns>[wanted, d].</returns>
    public Tensor Forward(Tensor x, RowContext rows, Func<Tensor, Tensor, Tensor, Tensor> attend, LayerRecord? record = null, bool inPlace = false, WantedRows? wanted = null)
    {
        using var scope = NewDisposeScope();
        var own = Own(x, wanted);
        Tensor output;
        using (NewDisposeScope())
        {
            var (q, k, v) = QueryKeyValue(x, own, rows, wanted);
            output = attend(q, k, v).MoveToOuterDisposeScope();
            record?.KeepHeads(q, k, v);
        }
        record?.MakeRoom(own.size(0), _config.IntermediateSize);
        var attention = output.flatten(1);
        var y = inPlace ? own : empty_like(own);
        Chunking.ForEach(own.size(0), rows.ChunkRows, (start, count) =>
        {
            Tensor At(Tensor t) => t.narrow(0, start, count);
            var r = AfterAttention(At(own), At(attention), rows.Dropout?.From(start));
            if (record?.Residual is { } kept) At(kept).copy_(r);
            var mlp = _mlp.ForwardChunk(_mlpNorm.forward(r), record?.Mlp is var (gate, up) ? (At(gate), At(up)) : null, rows.Dropout?.From(start));
            At(y).copy_(Through(_postMlpNorm, mlp).add_(r));
        });
        return ReferenceEquals(y, x) ? x : y.MoveToOuterDisposeScope();
    }

    /// <summary>The gradient of x [rows, d] from that of y [wanted, d], in the same memory where all rows are wanted; the weights' gradients are accumulated.</summary>
    /// <param name="record">Forward's; the caller disposes it.</param>
    /// <param name="gradient">dy. No longer valid afterwards.</param>
    /// <param name="rows">As in forward.</param>
    /// <param name="lengths">Rows of each document.</param>
    /// <param name="wanted">As in forward.</param>
    public Tensor Backward_(LayerRecord record, Tensor gradient, RowContext rows, IReadOnlyList<long> lengths, WantedRows? wanted = null)
    {
        using var scope = NewDisposeScope();
        var own = Own(record.Input, wanted);
        Tensor dq, dk, dv;
        using (NewDisposeScope())
        {
            var (q, k, v) = record.Heads ?? QueryKeyValue(record.Input, own, rows, wanted);
            var attention = record.Attention ?? Attend(q, k, v, lengths, wanted);
            var output = attention.Output;
            if (Attention.WorksInPlace(q, lengths, wanted?.Lengths))
            {
                var delta = empty([output.size(0), output.size(1)], ScalarType.Float32, output.device);
                BackwardAfterAttention(record, own, gradient, output, output, rows, delta);
                (dq, dk, dv) = (q, k, v);
                Attention.Backward_(output, dq, dk, dv, delta, attention.LogSumExp, lengths, _config.AttentionScale, _window, _config.AttnLogitSoftcapping, wanted?.Lengths);
            }
            else
            {
                var dOutput = empty_like(output);
                BackwardAfterAttention(record, own, gradient, output, dOutput, rows);
                (dq, dk, dv) = Attention.Backward(dOutput, q, k, v, attention, lengths, _config.AttentionScale, _window, _config.AttnLogitSoftcapping, wanted?.Lengths);
            }
            foreach (var t in new[] { dq, dk, dv }) t.MoveToOuterDisposeScope();
        }
        if (wanted is null)
        {
            BackwardHeads(record.Input, gradient, rows.Positions, rows, (Q, dq), (K, dk), (V, dv));
            return gradient;
        }
        BackwardHeads(own, gradient, Positions(rows, wanted), rows, (Q, dq));
        own.Dispose();
        dq.Dispose();
        var all = zeros_like(record.Input).index_copy_(0, wanted.Rows, gradient);
        gradient.Dispose();
        BackwardHeads(record.Input, all, rows.Positions, rows, (K, dk), (V, dv));
        return all.MoveToOuterDisposeScope();
    }

    /// <summary>The layer as a user of TorchSharp would write it, recorded by autograd: x [batch, S, d], positions 0..S−1.</summary>
    public Tensor Plain(Tensor x, RotaryEmbedding rotary)
    {
        using var scope = NewDisposeScope();
        var (cos, sin) = rotary.Rows(arange(x.size(1), ScalarType.Int64, x.device), x.size(1));
        var h = _attentionNorm.call(x);
        var q = RotaryEmbedding.Rotate(Through(_qNorm, Heads(_q.call(h))), cos, sin).transpose(1, 2);
        var k = RotaryEmbedding.Rotate(Through(_kNorm, Heads(_k.call(h))), cos, sin).transpose(1, 2);
        var v = Heads(_v.call(h)).transpose(1, 2);
        var attention = Attention.Plain(q, k, v, _config.AttentionScale, _window, _config.AttnLogitSoftcapping).transpose(1, 2).flatten(2);
        var r = x + Through(_postAttentionNorm, _o.call(attention));
        return (r + Through(_postMlpNorm, _mlp.Plain(_mlpNorm.call(r)))).MoveToOuterDisposeScope();
    }

    private (Tensor Q, Tensor K, Tensor V) QueryKeyValue(Tensor x, Tensor own, RowContext rows, WantedRows? wanted)
    {
        if (wanted is null)
        {
            var all = ForwardHeads(x, rows.Positions, rows, Q, K, V);
            return (all[0], all[1], all[2]);
        }
        var others = ForwardHeads(x, rows.Positions, rows, K, V);
        return (ForwardHeads(own, Positions(rows, wanted), rows, Q)[0], others[0], others[1]);
    }

    // norm → projection → norm of each head → rotary, a mini-sequence at a time: [rows, heads, D] for each part.
    private Tensor[] ForwardHeads(Tensor x, Tensor positions, RowContext rows, params HeadPart[] parts)
    {
        Tensor[] all = [.. parts.Select(p => empty([x.size(0), p.Projection.Weight.size(0) / _config.HeadDim, _config.HeadDim], x.dtype, x.device))];
        Chunking.ForEach(x.size(0), rows.ChunkRows, (start, count) =>
        {
            var h = _attentionNorm.forward(x.narrow(0, start, count));
            var (cos, sin) = rows.Rotary.Rows(positions.narrow(0, start, count), rows.MaxLength);
            foreach (var (part, target) in parts.Zip(all))
            {
                var t = target.narrow(0, start, count).copy_(Through(part.Norm, Heads(part.Projection.forward(h, rows.Dropout?.From(start)))));
                if (part.Turns) RotaryEmbedding.Rotate_(t, cos, sin);
            }
        });
        return all;
    }

    private Tensor AfterAttention(Tensor x, Tensor attention, DropoutRows? dropout) => Through(_postAttentionNorm, _o.forward(attention, dropout)).add_(x);

    // dy → dr in place, and the gradient of attention's output, which may take the output's place: then delta is what is needed of both.
    private void BackwardAfterAttention(LayerRecord record, Tensor x, Tensor gradient, Tensor output, Tensor dOutput, RowContext rows, Tensor? delta = null) =>
        Chunking.ForEach(gradient.size(0), rows.ChunkRows, (start, count) =>
        {
            Tensor At(Tensor t) => t.narrow(0, start, count);
            var dropout = rows.Dropout?.From(start);
            var (a, dr) = (At(output).flatten(1), At(gradient));
            using (NewDisposeScope())
            {
                var r = record.Residual is { } kept ? At(kept) : AfterAttention(At(x), a, dropout);
                dr.add_(BackwardMlp(r, dr, record.Mlp is var (gate, up) ? (At(gate), At(up)) : null, dropout)); // dr = dy + the way through the MLP
            }
            var dProjected = _postAttentionNorm?.Backward(_o.forward(a, dropout), dr) ?? dr;
            _o.AccumulateGradients(a, dProjected, dropout);
            var da = Heads(_o.InputGradient(dProjected, dropout));
            if (delta is not null) At(delta).copy_(Attention.Delta(da, At(output)));
            At(dOutput).copy_(da);
        });

    // The gradient of r through norm → MLP → norm, of one mini-sequence.
    private Tensor BackwardMlp(Tensor r, Tensor dy, (Tensor Gate, Tensor Up)? kept, DropoutRows? dropout)
    {
        var n = _mlpNorm.forward(r);
        if (_postMlpNorm is not null)
        {
            kept ??= (_mlp.GateProj.forward(n, dropout), _mlp.UpProj.forward(n, dropout));
            dy = _postMlpNorm.Backward(_mlp.OutputChunk(kept.Value.Gate, kept.Value.Up, dropout), dy);
        }
        return _mlpNorm.Backward(r, _mlp.BackwardChunk(n, dy, kept, dropout: dropout)!);
    }

    // gradient += the way of x through norm, projections and rotary, from the gradients of what these gave; a norm's gradient is linear in dh,
    // so parts may go one after the other.
    private void BackwardHeads(Tensor x, Tensor gradient, Tensor positions, RowContext rows, params (HeadPart Part, Tensor Gradient)[] parts) =>
        Chunking.ForEach(x.size(0), rows.ChunkRows, (start, count) =>
        {
            var xc = x.narrow(0, start, count);
            var h = _attentionNorm.forward(xc);
            var (cos, sin) = rows.Rotary.Rows(positions.narrow(0, start, count), rows.MaxLength);
            sin.neg_(); // the gradient of a rotation turns back
            var dropout = rows.Dropout?.From(start);
            Tensor? dh = null;
            foreach (var (part, all) in parts)
            {
                using var one = NewDisposeScope();
                var d = all.narrow(0, start, count);
                if (part.Turns) RotaryEmbedding.Rotate_(d, cos, sin);
                d = (part.Norm?.Backward(Heads(part.Projection.forward(h, dropout)), d) ?? d).flatten(1);
                part.Projection.AccumulateGradients(h, d, dropout);
                if (dh is null) dh = part.Projection.InputGradient(d, dropout).MoveToOuterDisposeScope();
                else part.Projection.AddInputGradient(dh, d, dropout);
            }
            gradient.narrow(0, start, count).add_(_attentionNorm.Backward(xc, dh!));
        });

    /// <summary>A projection to heads, the norm of each head, and whether the rotary embedding turns them.</summary>
    private readonly record struct HeadPart(Projection Projection, RmsNorm? Norm, bool Turns);

    private HeadPart Q => new(_q, _qNorm, true);

    private HeadPart K => new(_k, _kNorm, true);

    private HeadPart V => new(_v, null, false);

    private static Tensor Own(Tensor x, WantedRows? wanted) => wanted is null ? x : x.index_select(0, wanted.Rows);

    private static Tensor Positions(RowContext rows, WantedRows wanted) => rows.Positions.index_select(0, wanted.Rows);

    private static Tensor Through(RmsNorm? norm, Tensor x) => norm?.forward(x) ?? x;

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

/// <summary>Matrices without values, which a checkpoint or the model's own initialization gives them: drawing them first would take as long as loading.</summary>
internal static class Uninitialized
{
    public static Projection Projection(long inFeatures, long outFeatures, bool bias, ScalarType dtype, Device? device) =>
        new(Matrix(outFeatures, inFeatures, dtype, device), bias ? new Parameter(zeros(outFeatures, dtype, device)) : null);

    public static Parameter Matrix(long rows, long columns, ScalarType dtype, Device? device) => new(empty([rows, columns], dtype, device));
}
