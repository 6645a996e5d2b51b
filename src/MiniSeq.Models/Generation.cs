using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>How text is continued, under the names of Hugging Face's <c>generation_config.json</c>.</summary>
public sealed record GenerationOptions
{
    /// <summary>The most tokens to add.</summary>
    public int MaxNewTokens { get; init; } = 128;

    /// <summary>False takes the likeliest token (greedy); true draws one.</summary>
    public bool DoSample { get; init; }

    /// <summary>Logits are divided by it before drawing.</summary>
    public double Temperature { get; init; } = 1;

    /// <summary>Only the k likeliest tokens may be drawn; 0 allows all.</summary>
    public int TopK { get; init; }

    /// <summary>Only the likeliest tokens that together reach this probability may be drawn; 1 allows all.</summary>
    public double TopP { get; init; } = 1;

    /// <summary>Seed of the draws; null takes a new one.</summary>
    public int? Seed { get; init; }

    /// <summary>Tokens that end a text and are not part of it; null takes those of the model's configuration.</summary>
    public IReadOnlyCollection<int>? EosTokenIds { get; init; }
}

/// <summary>Continues texts with a key/value cache: the prompts in one packed pass, then one token a step for all that go on.</summary>
public static class Generation
{
    /// <summary>The new tokens of each prompt, in order, without the end-of-sequence token.</summary>
    /// <param name="model">The model; its weights are read only.</param>
    /// <param name="prompts">Token ids of each prompt, at least one.</param>
    /// <param name="options">Length and manner.</param>
    /// <param name="onToken">Called with (prompt index, token) as each token is chosen.</param>
    /// <param name="cancellationToken">Looked at before each token.</param>
    /// <exception cref="ArgumentException">An empty prompt, a token outside the vocabulary, or an option outside its range.</exception>
    public static IReadOnlyList<int[]> Generate(this CausalLM model, IReadOnlyList<int[]> prompts, GenerationOptions? options = null,
        Action<int, int>? onToken = null, CancellationToken cancellationToken = default)
    {
        options ??= new GenerationOptions();
        Check(prompts, options);
        var results = prompts.Select(_ => new List<int>()).ToList();
        if (prompts.Count == 0 || options.MaxNewTokens == 0) return [.. results.Select(r => r.ToArray())];
        var eos = options.EosTokenIds ?? [.. model.Config.EosTokenIds];
        var random = options.Seed is { } seed ? new Random(seed) : new Random();
        using var noGrad = no_grad();
        using var all = NewDisposeScope();
        var caches = prompts.Select(p => new KeyValueCache(model, p.Length + options.MaxNewTokens)).ToList();
        List<int> active = [.. Enumerable.Range(0, prompts.Count)];
        var rows = prompts; // first the whole prompts, then the last token of each
        while (true)
        {
            cancellationToken.ThrowIfCancellationRequested();
            using var step = NewDisposeScope();
            var logits = Logits(model, rows, [.. active.Select(i => caches[i])]);
            var goOn = new List<int>();
            for (int n = 0; n < active.Count; n++)
            {
                int i = active[n], token = Choose(logits[n], options, random);
                if (eos.Contains(token)) continue;
                results[i].Add(token);
                onToken?.Invoke(i, token);
                goOn.Add(i);
            }
            active = goOn;
            if (active.Count == 0 || results[active[0]].Count >= options.MaxNewTokens) return [.. results.Select(r => r.ToArray())];
            rows = [.. active.Select(i => new[] { results[i][^1] })];
        }
    }

    // Logits [texts, V] after the last of the new tokens of each text; the caches grow by them.
    private static Tensor Logits(CausalLM model, IReadOnlyList<int[]> tokens, IReadOnlyList<KeyValueCache> caches)
    {
        using var batch = new TokenBatch([.. tokens.Select(t => new TokenSequence([.. t.Select(id => (long)id)]))], model.Device);
        model.CheckIds(batch.InputIds);
        using var positions = tensor((long[])[.. tokens.Zip(caches).SelectMany(p => Enumerable.Range(p.Second.Length, p.First.Length).Select(i => (long)i))], device: model.Device);
        var rows = new RowContext(positions, caches.Zip(tokens).Max(p => p.First.Length + p.Second.Length), model.Rotary,
            Chunking.Rows(Chunking.Auto, batch.RowCount, model.Config.IntermediateSize, model.DType));
        var x = model.Embed(batch.InputIds);
        for (int l = 0; l < model.Layers.Count; l++)
        {
            var layer = model.Layers[l];
            int at = l;
            layer.Forward(x, rows, (q, k, v) => KeyValueCache.Attend(caches, at, layer, q, k, v, batch.Lengths), inPlace: true);
        }
        foreach (var (cache, added) in caches.Zip(tokens)) cache.Length += added.Length;
        long end = 0;
        long[] last = [.. batch.Lengths.Select(n => (end += n) - 1)];
        var z = model.Logits(x.index_select(0, tensor(last, device: model.Device)));
        return z.to(Gradients.AccumulationType(z.dtype));
    }

    private static int Choose(Tensor logits, GenerationOptions options, Random random)
    {
        if (!options.DoSample) return (int)logits.argmax().item<long>();
        using var scope = NewDisposeScope();
        var (sorted, ids) = logits.div(options.Temperature).sort(descending: true);
        if (options.TopK > 0 && options.TopK < sorted.numel()) sorted = sorted.narrow(0, 0, options.TopK);
        double[] p = sorted.to(ScalarType.Float64).softmax(0).cpu().data<double>().ToArray();
        int kept = 0;
        double mass = 0;
        while (kept < p.Length && (kept == 0 || mass < options.TopP)) mass += p[kept++];
        double draw = random.NextDouble() * mass;
        int chosen = 0;
        while (chosen < kept - 1 && (draw -= p[chosen]) >= 0) chosen++;
        return (int)ids[chosen].item<long>();
    }

    private static void Check(IReadOnlyList<int[]> prompts, GenerationOptions options)
    {
        for (int i = 0; i < prompts.Count; i++)
            if (prompts[i].Length == 0) throw new ArgumentException($"Prompt {i} has no token: a text without a beginning-of-sequence token needs at least one.", nameof(prompts));
        if (options.MaxNewTokens < 0) throw new ArgumentException($"MaxNewTokens is {options.MaxNewTokens}; it must not be negative.", nameof(options));
        if (options.DoSample && options.Temperature <= 0) throw new ArgumentException($"Temperature is {options.Temperature}; it must be positive (or DoSample false, for the likeliest token).", nameof(options));
        if (options.TopK < 0 || options.TopP is <= 0 or > 1) throw new ArgumentException($"TopK {options.TopK} must not be negative, and TopP {options.TopP} must be in (0, 1].", nameof(options));
    }

    /// <summary>Keys and values of one text, for each layer [capacity, Hkv, D]. Lives in the scope that makes it.</summary>
    private sealed class KeyValueCache
    {
        private readonly Tensor[] _keys;
        private readonly Tensor[] _values;

        public KeyValueCache(CausalLM model, long capacity)
        {
            Tensor[] All() => [.. model.Layers.Select(_ => empty([capacity, model.Config.NumKeyValueHeads, model.Config.HeadDim], model.DType, model.Device))];
            (_keys, _values) = (All(), All());
        }

        /// <summary>Tokens seen.</summary>
        public int Length { get; set; }

        /// <summary>Adds the new keys and values of every text and lets its queries see all of its own.</summary>
        public static Tensor Attend(IReadOnlyList<KeyValueCache> caches, int index, DecoderLayer layer, Tensor q, Tensor k, Tensor v, IReadOnlyList<long> lengths)
        {
            var output = empty_like(q);
            long start = 0;
            for (int i = 0; i < caches.Count; i++)
            {
                using var scope = NewDisposeScope();
                long n = lengths[i];
                Tensor keys = caches[i]._keys[index], values = caches[i]._values[index];
                keys.narrow(0, caches[i].Length, n).copy_(k.narrow(0, start, n));
                values.narrow(0, caches[i].Length, n).copy_(v.narrow(0, start, n));
                long seen = caches[i].Length + n;
                output.narrow(0, start, n).copy_(layer.AttendWithCache(q.narrow(0, start, n), keys.narrow(0, 0, seen), values.narrow(0, 0, seen)));
                start += n;
            }
            return output;
        }
    }
}
