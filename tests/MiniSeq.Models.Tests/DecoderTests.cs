using MiniSeq.Layers;
using MiniSeq.Models;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class DecoderTests
{
    internal static DecoderConfig Tiny(bool tied = false) => DecoderConfig.Llama(31, 12, 20, 3, 3, 1, tied) with { HeadDim = 4, InitializerRange = 0.3 };

    private static (TokenBatch Batch, Tensor Ids, Tensor Labels) Batch(int rows, int length, int seed)
    {
        random.manual_seed(seed);
        var ids = randint(0, 31, [rows, length], ScalarType.Int64);
        var labels = ids.clone();
        labels[.., ..(length / 3)] = -100;
        var documents = Enumerable.Range(0, rows).Select(b => new TokenSequence(ids[b].data<long>().ToArray(), labels[b].data<long>().ToArray())).ToList();
        return (new TokenBatch(documents), ids, labels);
    }

    [Theory]
    [InlineData(false, 1, RecomputePolicy.Full)]
    [InlineData(true, 5, RecomputePolicy.KeepAttention)]
    [InlineData(false, 0, RecomputePolicy.None)]
    [InlineData(true, 4, RecomputePolicy.None)]
    [InlineData(false, 100, RecomputePolicy.Auto)]
    public void DrivenEqualsPlain(bool tied, int chunk, RecomputePolicy policy)
    {
        using var scope = NewDisposeScope();
        using var model = new CausalLM(Tiny(tied), ScalarType.Float64);
        var (batch, ids, labels) = Batch(2, 11, 5);
        using var plain = PlainDecoder.LossSum(model, ids, labels);
        (plain * 0.25).backward();
        var want = GradientsOf(model);
        ClearGradients(model);

        using var loss = model.ForwardBackward(batch, 0.25, new ComputeOptions(chunk, policy));
        Close(loss.LossSum, plain, 1e-12);
        foreach (var (name, gradient) in GradientsOf(model)) Close(gradient, want[name], 1e-11);
        Assert.Equal(plain.item<double>(), model.Evaluate(batch, new ComputeOptions(chunk)).LossSum, 1e-9);
        Close(model.call(ids), PlainDecoder.Logits(model, ids), 1e-12);

        ClearGradients(model);
        PlainDecoder.LossSum(model, ids, labels, recompute: true).mul(0.25).backward();
        foreach (var (name, gradient) in GradientsOf(model)) Close(gradient, want[name], 1e-11);
        batch.Dispose();
    }

    [Fact]
    public void PackingDoesNotChangeADocument()
    {
        using var scope = NewDisposeScope();
        using var model = new CausalLM(Tiny(), ScalarType.Float64);
        TokenSequence Document(int n, int seed)
        {
            random.manual_seed(seed);
            var ids = randint(0, 31, [n], ScalarType.Int64).data<long>().ToArray();
            return new TokenSequence(ids, ids);
        }
        TokenSequence[] documents = [Document(7, 1), Document(1, 2), Document(13, 3)];
        double alone = 0;
        foreach (var d in documents)
        {
            using var one = new TokenBatch([d]);
            using var loss = model.ForwardBackward(one, 1);
            alone += loss.LossSum.item<double>();
        }
        var want = GradientsOf(model);
        ClearGradients(model);
        using var packed = new TokenBatch(documents);
        using var together = model.ForwardBackward(packed, 1, new ComputeOptions(4));
        Assert.Equal(18, together.TokenCount);
        Assert.Equal(alone, together.LossSum.item<double>(), 1e-9);
        foreach (var (name, gradient) in GradientsOf(model)) Close(gradient, want[name], 1e-11);
    }

    [Fact]
    public void NoTargetAtAllTouchesNothing()
    {
        using var scope = NewDisposeScope();
        using var model = new CausalLM(Tiny());
        using var batch = new TokenBatch([new TokenSequence([1, 2, 3], [-100, -100, -100])]);
        using var loss = model.ForwardBackward(batch, 1);
        Assert.Equal((0.0, 0L), (loss.Mean, loss.TokenCount));
        Assert.All(model.parameters(), p => Assert.Null(p.grad));
        Assert.Equal(default, model.Evaluate(batch));
    }

    [Fact]
    public void FrozenParametersGetNoGradientAndTheRestIsUnchanged()
    {
        using var scope = NewDisposeScope();
        using var model = new CausalLM(Tiny(), ScalarType.Float64);
        var (batch, _, _) = Batch(1, 9, 6);
        model.ForwardBackward(batch, 1).Dispose();
        var want = GradientsOf(model);
        ClearGradients(model);
        foreach (var (name, p) in model.named_parameters()) p.requires_grad = name.Contains("v_proj");
        model.ForwardBackward(batch, 1).Dispose();
        foreach (var (name, gradient) in GradientsOf(model))
            if (name.Contains("v_proj")) Close(gradient, want[name], 1e-12);
            else Assert.Null(gradient);
        batch.Dispose();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void EachGradientIsCompleteWhenItIsSaidToBe(bool tied)
    {
        using var scope = NewDisposeScope();
        using var model = new CausalLM(Tiny(tied), ScalarType.Float64);
        var (batch, _, _) = Batch(2, 9, 6);
        model.ForwardBackward(batch, 1).Dispose();
        var want = GradientsOf(model);
        ClearGradients(model);
        model.get_parameter("model.layers.1.mlp.up_proj.weight")!.requires_grad = false;
        var names = model.named_parameters().ToDictionary(p => p.parameter.Handle, p => p.name);
        using var cancelled = new CancellationTokenSource();
        var groups = new List<string[]>();
        model.ForwardBackward(batch, 1, null, cancelled.Token, (loss, parameters) =>
        {
            cancelled.Cancel(); // too late: backward goes on
            Assert.True(double.IsFinite(loss.item<double>()));
            groups.Add([.. parameters.Select(p => names[p.Handle])]);
            foreach (var p in parameters)
            {
                Close(p.grad, want[names[p.Handle]], 1e-12);
                p.grad = null;
                using (no_grad()) p.fill_(double.NaN); // not read again
            }
        }).Dispose();
        Assert.All(model.parameters(), p => Assert.Null(p.grad));
        string[] head = tied ? ["model.norm.weight"] : ["lm_head.weight", "model.norm.weight"];
        Assert.Equal(head, groups[0].Order(StringComparer.Ordinal));
        for (int i = 0; i < 3; i++) Assert.All(groups[i + 1], name => Assert.StartsWith($"model.layers.{2 - i}.", name));
        Assert.Equal(["model.embed_tokens.weight"], groups[4]);
        Assert.Equal(want.Keys.Except(["model.layers.1.mlp.up_proj.weight"]).Order(StringComparer.Ordinal), groups.SelectMany(g => g).Order(StringComparer.Ordinal));
        batch.Dispose();
    }

    [Fact]
    public void BFloat16IsAsNearToFloat32AsThePlainFormIs()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(9);
        using var wide = new CausalLM(Tiny());
        using var narrow = new CausalLM(Tiny(), ScalarType.BFloat16);
        using (no_grad())
            foreach (var ((_, a), (_, b)) in narrow.named_parameters().Zip(wide.named_parameters())) a.copy_(b);
        var (batch, ids, labels) = Batch(2, 40, 7);
        wide.ForwardBackward(batch, 0.1).Dispose();
        var want = GradientsOf(wide);
        PlainDecoder.LossSum(narrow, ids, labels).mul(0.1).backward();
        var plain = GradientsOf(narrow);
        ClearGradients(narrow);
        narrow.ForwardBackward(batch, 0.1, new ComputeOptions(4)).Dispose();
        double Error(Dictionary<string, Tensor?> got) => Math.Sqrt(want.Sum(w => Math.Pow(((got[w.Key]!.to(ScalarType.Float64) - w.Value!).norm() / w.Value!.norm()).item<double>(), 2)) / want.Count);
        Assert.InRange(Error(GradientsOf(narrow)), 0, 1.25 * Error(plain));
        batch.Dispose();
    }

    [Fact]
    public void ParameterNamesAreHuggingFaces()
    {
        using var model = new CausalLM(DecoderConfig.Llama(31, 12, 20, 1, 3, 1));
        Assert.Equal(["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
            "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.post_attention_layernorm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.o_proj.weight",
            "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight", "model.norm.weight"],
            model.named_parameters().Select(p => p.name).Order(StringComparer.Ordinal));
    }

    [Fact]
    public void ATokenOutsideTheVocabularyIsNamed()
    {
        using var model = new CausalLM(Tiny());
        using var batch = new TokenBatch([new TokenSequence([1, 31], [1, 2])]);
        Assert.Contains("Token id 31", Assert.Throws<ArgumentException>(() => model.ForwardBackward(batch, 1)).Message);
        Assert.Throws<ArgumentException>(() => new TokenBatch([]));
        Assert.Throws<ArgumentException>(() => new TokenBatch([new TokenSequence([], [])]));
    }

    [Fact]
    public void MemoryOfAStepDoesNotHoldTheVocabularyOrTheIntermediateForAllRows()
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        using var model = new CausalLM(DecoderConfig.Llama(8192, 32, 1024, 2, 2, 1));
        long Peak(int length)
        {
            long[] ids = [.. Enumerable.Range(0, length).Select(i => (long)(i * 7 % 8192))];
            using var batch = new TokenBatch([new TokenSequence(ids, ids)]);
            long before = TensorMemory.LiveBytes;
            TensorMemory.ResetPeak();
            model.ForwardBackward(batch, 1, new ComputeOptions(256, RecomputePolicy.Full)).Dispose();
            return TensorMemory.PeakBytes - before;
        }
        Peak(512);
        long perRow = (Peak(4096) - Peak(2048)) / 2048;
        Assert.InRange(perRow, 0, 4 * 32 * 16); // 16 vectors of the hidden size; one row of logits alone would be 32 kB
    }
}
