using System.Diagnostics;
using MiniSeq.Layers;
using MiniSeq.Models;
using TorchSharp;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>What forward and backward of mini-sequence consist of, each piece run alone on tensors of its own beside the model's weights.</summary>
internal sealed class StepPieces : IDisposable
{
    private const string Forward = "products: forward", Again = "products: again in backward", InputGradients = "products: input gradients", WeightGradients = "products: weight gradients",
        Head = "products: head", AttentionForward = "attention: forward", AttentionAgain = "attention: again in backward", AttentionBackward = "attention: backward",
        Softmax = "softmax of the head", Norms = "norms", Rotary = "rotary embedding", Activations = "activation", Copies = "copies and residual sums",
        Adding = "weight gradients added in float32", Embedding = "input embedding";

    private const double EnoughSeconds = 0.1, PatienceSeconds = 2;
    private const int FewestRuns = 3, MostRuns = 20;
    private const long BlockBytes = 16 << 20; // of a weight gradient at a time, as Gradients.AddProduct

    // The layers' own is not public.
    private static readonly Lazy<jit.CompilationUnit> s_script = new(() => jit.compile(
        """
        def silu_backward(dy: Tensor, x: Tensor):
            return torch.silu_backward(dy, x)

        """));

    /// <summary>How many of its calls the step makes, and for which line of the table.</summary>
    private sealed record Use(string Part, double Calls);

    /// <summary>Something the step does.</summary>
    /// <param name="Run">Once; the argument is the layer whose weights it takes.</param>
    /// <param name="Flops">Of a call, for products.</param>
    /// <param name="Uses">Where its time goes.</param>
    /// <param name="Less">What it does beside: that time is taken off.</param>
    private sealed record Piece(Action<int> Run, double Flops, Use[] Uses, Action<int>? Less = null)
    {
        public List<double> Seconds { get; } = [];
    }

    private readonly List<Piece> _pieces = [];
    private readonly DisposeScope _scope = NewDisposeScope(); // of everything made here, for the life of this object
    private readonly CausalLM _model;
    private readonly Shape _shape;
    private readonly DecoderConfig _config;
    private readonly Dictionary<string, Parameter> _weights;
    private readonly long _rows; // of a mini-sequence
    private readonly long _logitRows;
    private readonly bool _rounds; // whether weight gradients are rounded to 16 bits before they are added

    // Rows that the step runs over, all layers together: those of queries, output projection and MLP (the last layer's only from the first label on),
    // those of keys and values, and of both those that are computed again, those whose products are kept, and those of the norm before attention.
    private readonly double _own, _all, _ownAgain, _allAgain, _ownKept, _normed, _normedAgain;
    private readonly double _targets;

    public StepPieces(Shape shape, CausalLM model, MemoryPlan plan, IReadOnlyList<TokenSequence> documents)
    {
        (_shape, _model, _config) = (shape, model, model.Config);
        _weights = model.named_parameters().ToDictionary(p => p.name, p => p.parameter);
        (_rows, _logitRows) = (plan.ChunkRows, plan.LogitRows);
        _rounds = Gradients.AccumulationType(model.DType) != model.DType;
        using var batch = new TokenBatch(documents);
        var targets = LinearCrossEntropy.ValidRows(batch.Targets, _config.VocabSize);
        var wanted = WantedRows.From(targets, batch.Lengths);
        _targets = targets.numel();
        int last = _config.NumHiddenLayers - 1;
        for (int l = 0; l <= last; l++)
        {
            double all = batch.RowCount, own = l == last && wanted is not null ? wanted.Rows.numel() : all;
            double normed = own < all ? all + own : all; // apart for the queries
            bool again = plan.Layers[l] != RecomputePolicy.None;
            (_own, _all, _normed) = (_own + own, _all + all, _normed + normed);
            if (again) (_ownAgain, _allAgain, _normedAgain) = (_ownAgain + own, _allAgain + all, _normedAgain + normed);
            else _ownKept += own;
        }
        using var noGrad = no_grad();
        AddProducts();
        AddHead();
        AddAttention(plan, batch.Lengths, wanted?.Lengths);
        AddRowWise();
        AddEmbedding(batch.InputIds.alias());
    }

    /// <summary>Times every piece once more.</summary>
    public void Time()
    {
        using var noGrad = no_grad();
        foreach (var piece in _pieces) piece.Seconds.Add(SecondsOf(piece.Run) - (piece.Less is null ? 0 : SecondsOf(piece.Less)));
    }

    /// <summary>The lines of the table, from the medians of all times.</summary>
    public List<StepProfile.Part> Parts() =>
        [.. _pieces.SelectMany(p => p.Uses.Select(u => new StepProfile.Part(u.Part, u.Calls, u.Calls * Math.Max(0, Report.Median(p.Seconds)), u.Calls * p.Flops)))
            .GroupBy(p => p.Name).Select(g => new StepProfile.Part(g.Key, g.Sum(p => p.Calls), g.Sum(p => p.Seconds), g.Sum(p => p.Flops))).Where(p => p.Calls > 0)
            .OrderBy(p => Array.IndexOf(s_order, p.Name))];

    private static readonly string[] s_order = [Forward, Again, InputGradients, WeightGradients, Head, AttentionForward, AttentionAgain, AttentionBackward, Softmax, Norms, Rotary, Activations, Copies, Adding, Embedding];

    // The seven projections of a layer, each over the rows that it sees: which of them are computed again, and how the gradients go.
    private void AddProducts()
    {
        foreach (var (name, rows, again) in new[]
        {
            ("self_attn.q_proj", _own, _ownAgain), ("self_attn.k_proj", _all, _allAgain), ("self_attn.v_proj", _all, _allAgain), ("self_attn.o_proj", _own, _ownAgain),
            ("mlp.gate_proj", _own, _ownAgain), ("mlp.up_proj", _own, _ownAgain), ("mlp.down_proj", _own, 0),
        })
        {
            Parameter Weight(int layer) => _weights[$"model.layers.{layer}.{name}.weight"];
            var (x, dy) = (Random(_rows, Weight(0).size(1)), Random(_rows, Weight(0).size(0)));
            AddLinear(Weight, x, dy, _rows, [PerRows(Forward, rows), PerRows(Again, again)], PerRows(InputGradients, rows), PerRows(WeightGradients, rows), PerRows(Adding, rows));
        }
    }

    private void AddHead()
    {
        Use Of(string part) => new(part, _targets / _logitRows);
        var x = Random(_logitRows, _config.HiddenSize);
        var weight = _model.Head.Weight;
        AddLinear(_ => weight, x, Random(_logitRows, _config.VocabSize), _logitRows, [Of(Head)], Of(Head), Of(Head), Of(Adding));
        var frozen = new Projection(new Parameter(weight.detach(), requires_grad: false));
        var labels = randint(0, _config.VocabSize, [_logitRows], dtype: ScalarType.Int64);
        Add(_ => LinearCrossEntropy.Chunk(x, frozen, labels, 1, needsHiddenGradient: false), 0, _ => nn.functional.linear(x, weight), Of(Softmax));
    }

    // y = x Wᵀ, dx = dy W, dW += dyᵀ x.
    private void AddLinear(Func<int, Parameter> weight, Tensor x, Tensor dy, long rows, Use[] forward, Use inputGradient, Use weightGradient, Use adding)
    {
        double flops = 2.0 * rows * x.size(1) * dy.size(1);
        Add(l => nn.functional.linear(x, weight(l)), flops, null, forward);
        Add(l => dy.mm(weight(l)), flops, null, inputGradient);
        void Accumulate(int layer) => Gradients.AccumulateProduct(weight(layer), dy, x);
        Add(_rounds ? _ => Products(dy, x) : Accumulate, flops, null, weightGradient);
        if (_rounds) Add(Accumulate, 0, _ => Products(dy, x), adding);
    }

    private static void Products(Tensor dy, Tensor x)
    {
        using var t = dy.t();
        Chunking.ForEach(t.size(0), Math.Max(Chunking.FullSpeedRows, BlockBytes / (x.size(1) * x.element_size())), (start, count) => t.narrow(0, start, count).mm(x));
    }

    private void AddAttention(MemoryPlan plan, IReadOnlyList<long> lengths, IReadOnlyList<long>? wanted)
    {
        int full = _config.NumHiddenLayers - (wanted is null ? 0 : 1);
        AddAttention(lengths, null, full, plan.Layers.Take(full).Count(l => l == RecomputePolicy.Full));
        if (wanted is not null) AddAttention(lengths, wanted, 1, plan.Layers[^1] == RecomputePolicy.Full ? 1 : 0);
    }

    private void AddAttention(IReadOnlyList<long> lengths, IReadOnlyList<long>? queries, int layers, int again)
    {
        const double BackwardProducts = 2.5; // five products for forward's two
        if (layers == 0) return;
        var (q, k, v) = (Heads((queries ?? lengths).Sum(), _config.NumAttentionHeads), Heads(lengths.Sum(), _config.NumKeyValueHeads), Heads(lengths.Sum(), _config.NumKeyValueHeads));
        var dOutput = rand_like(q);
        Attention.Result? kept = null;
        // A query sees all before it: of n last rows of a document, n · S − n² / 2 scores.
        double scores = lengths.Zip(queries ?? lengths, (s, n) => ((double)n * s) - ((double)n * n / 2)).Sum();
        double flops = 4 * scores * _config.NumAttentionHeads * _config.HeadDim;
        Attention.Result Run() => Attention.Forward(q, k, v, lengths, _config.AttentionScale, queries: queries);
        Add(_ => Run(), flops, null, new Use(AttentionForward, layers), new Use(AttentionAgain, again));
        Add(_ => Attention.Backward(dOutput, q, k, v, kept ??= Kept(Run()), lengths, _config.AttentionScale, queries: queries), BackwardProducts * flops, null, new Use(AttentionBackward, layers));
    }

    private Attention.Result Kept(Attention.Result result)
    {
        foreach (var t in result.LogSumExp.Append(result.Output).OfType<Tensor>()) _scope.Attach(t.DetachFromDisposeScope());
        return result;
    }

    // In the order of DecoderLayer: forward, then what is computed again, then backward; the head's own at the end.
    private void AddRowWise()
    {
        int d = _config.HiddenSize, inner = _config.IntermediateSize;
        double queries = (double)_config.NumAttentionHeads * _config.HeadDim / d, keysValues = 2.0 * _config.NumKeyValueHeads * _config.HeadDim / d; // widths, in hidden sizes
        var (x, y) = (Random(_rows, d), Random(_rows, d));
        var norm = new RmsNorm(d, _config.RmsNormEps, _model.DType);
        Add(_ => norm.forward(x), 0, null, PerRows(Norms, _own + _normed + _normedAgain + _own + _normed + _targets));
        Add(_ => norm.Backward(x, y), 0, null, PerRows(Norms, _own + _normed + _targets));
        Add(_ => y.add_(x, 1e-9), 0, null, PerRows(Copies, (2 * _own) + _ownAgain + _own + _normed));
        double heads = (_own * queries) + (_all * keysValues), headsAgain = (_ownAgain * queries) + (_allAgain * keysValues), kept = _ownKept * ((2.0 * inner / d) + 1);
        Add(_ => y.copy_(x), 0, null, PerRows(Copies, _own + heads + headsAgain + kept + (_own * queries) + (2 * _targets)));

        var (q, k) = (Heads(_rows, _config.NumAttentionHeads), Heads(_rows, _config.NumKeyValueHeads));
        var positions = arange(_rows, ScalarType.Int64).remainder_(_shape.Seq);
        var (cos, sin) = _model.Rotary.Rows(positions, _shape.Seq);
        Add(_ => RotaryEmbedding.Rotate_(q, cos, sin), 0, null, PerRows(Rotary, (2 * _own) + _ownAgain));
        Add(_ => RotaryEmbedding.Rotate_(k, cos, sin), 0, null, PerRows(Rotary, (2 * _all) + _allAgain));
        Add(_ => _model.Rotary.Rows(positions, _shape.Seq), 0, null, PerRows(Rotary, (2 * _normed) + _normedAgain));

        var (gate, up, dHidden) = (Random(_rows, inner), Random(_rows, inner), Random(_rows, inner));
        Add(_ => nn.functional.silu(gate).mul_(up), 0, null, PerRows(Activations, _own));
        Add(_ => ActivationBackward(gate, up, dHidden.clone()), 0, _ => dHidden.clone(), PerRows(Activations, _own));
    }

    // As GatedMlp.BackwardChunk, without its products.
    private static void ActivationBackward(Tensor gate, Tensor up, Tensor dHidden)
    {
        var act = nn.functional.silu(gate);
        (act * up).Dispose();
        act.mul_(dHidden);
        s_script.Value.invoke("silu_backward", dHidden.mul_(up), gate);
    }

    private void AddEmbedding(Tensor ids)
    {
        var dx = Random(ids.size(0), _config.HiddenSize);
        Add(_ => _model.Embed(ids), 0, null, new Use(Embedding, 1));
        Add(_ => _model.Embedding.Backward(ids, dx), 0, null, new Use(Embedding, 1));
    }

    private void Add(Action<int> run, double flops, Action<int>? less, params Use[] uses) => _pieces.Add(new Piece(run, flops, uses, less));

    private Use PerRows(string part, double rows) => new(part, rows / _rows);

    private Tensor Random(long rows, long columns) => (rand(rows, columns) - 0.5).to(_model.DType);

    private Tensor Heads(long rows, long heads) => Random(rows, heads * _config.HeadDim).view(rows, heads, -1);

    // Layer after layer, so that weights come from memory as they do in the step.
    private double SecondsOf(Action<int> run)
    {
        List<double> seconds = [];
        var all = Stopwatch.StartNew();
        for (int i = 0; i <= MostRuns && (i <= FewestRuns ? i < 2 || all.Elapsed.TotalSeconds < PatienceSeconds : all.Elapsed.TotalSeconds < EnoughSeconds); i++)
        {
            using var scope = NewDisposeScope();
            double once = Turns.Seconds(() => run(i % _config.NumHiddenLayers));
            if (i > 0) seconds.Add(once);
        }
        return Report.Median(seconds);
    }

    public void Dispose() => _scope.Dispose();
}
