using System.Text.Json.Nodes;
using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Models.Tests;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class LoraTests
{
    private static readonly string[] s_everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"];

    private static LoraConfig Everywhere(double dropout = 0) => new() { R = 3, LoraAlpha = 5, LoraDropout = dropout, TargetModules = s_everywhere };

    // A model with an adapter whose A and B are both far from zero.
    private static CausalLM Adapted(LoraConfig config, bool tied = false, ScalarType dtype = ScalarType.Float64)
    {
        random.manual_seed(3);
        var model = new CausalLM(DecoderTests.Tiny(tied), dtype);
        model.AddAdapter(config);
        using var noGrad = no_grad();
        foreach (var (name, p) in model.named_parameters())
            if (name.Contains("lora_")) p.normal_(0, 0.3);
        return model;
    }

    private static (TokenBatch Batch, Tensor Ids, Tensor Labels) Batch(int rows, int length, int vocabulary = 31)
    {
        random.manual_seed(5);
        var ids = randint(0, vocabulary, [rows, length], ScalarType.Int64);
        var labels = ids.clone();
        labels[.., ..(length / 3)] = -100;
        return (BatchOf(ids, labels), ids, labels);
    }

    private static TokenBatch BatchOf(Tensor ids, Tensor labels) =>
        new([.. Enumerable.Range(0, (int)ids.size(0)).Select(b => new TokenSequence(ids[b].data<long>().ToArray(), labels[b].data<long>().ToArray()))]);

    private static string Reference => Shared.Path("reference/llama3/adapter");

    private static CausalLM ReferenceModel()
    {
        var model = Checkpoint.LoadPretrained(Path.GetDirectoryName(Reference)!);
        model.LoadAdapter(Reference);
        return model;
    }

    [Fact]
    public void LoadingAnAdapterDrawsNothing()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(5);
        float want = rand(1).item<float>();
        random.manual_seed(5);
        using var model = ReferenceModel();
        Assert.Equal(want, rand(1).item<float>());
    }

    [Fact]
    public void WhatPeftSavedIsSavedAgainBitForBit()
    {
        using var scope = NewDisposeScope();
        using var folder = new TemporaryFolder();
        using var model = ReferenceModel();
        model.SaveAdapter(folder.Path);
        using var want = SafetensorsReader.Open(Path.Combine(Reference, "adapter_model.safetensors"));
        using var got = SafetensorsReader.Open(folder["adapter_model.safetensors"]);
        Assert.Equal(want.Names.Order(), got.Names.Order());
        foreach (string name in want.Names)
        {
            Assert.Equal(want.DType(name), got.DType(name));
            Assert.Equal(want.Read(name).bytes.ToArray(), got.Read(name).bytes.ToArray());
        }
        var (there, here) = (Json(Path.Combine(Reference, "adapter_config.json")), Json(folder["adapter_config.json"]));
        foreach (var (key, value) in here) Assert.True(JsonNode.DeepEquals(value, there[key]), key);
        Assert.Equal(2, Directory.GetFiles(folder.Path).Length);
    }

    private static JsonObject Json(string file) => JsonNode.Parse(File.ReadAllText(file))!.AsObject();

    [Theory]
    [InlineData(false, 1, RecomputePolicy.Full)]
    [InlineData(true, 5, RecomputePolicy.KeepAttention)]
    [InlineData(false, 0, RecomputePolicy.None)]
    [InlineData(true, 1, RecomputePolicy.None)]
    [InlineData(false, 5, RecomputePolicy.Auto)]
    public void ChunkedGradientsOfAnAdapterEverywhereArePlainAutograds(bool tied, int chunk, RecomputePolicy policy)
    {
        using var scope = NewDisposeScope();
        using var model = Adapted(Everywhere() with { UseRslora = tied }, tied);
        var (batch, ids, labels) = Batch(2, 11);
        using var plain = PlainDecoder.LossSum(model, ids, labels);
        (plain * 0.25).backward();
        var want = GradientsOf(model);
        ClearGradients(model);
        using var loss = model.ForwardBackward(batch, 0.25, new ComputeOptions(chunk, policy));
        batch.Dispose();
        Close(loss.LossSum, plain, 1e-12);
        Close(model.call(ids), PlainDecoder.Logits(model, ids), 1e-12);
        var got = GradientsOf(model);
        Assert.Equal(2 * ((3 * 7) + 2), got.Count(g => g.Value is not null));
        foreach (var (name, gradient) in got)
        {
            Assert.Equal(name.Contains("lora_"), gradient is not null);
            Close(gradient, want[name], 1e-11);
        }
    }

    // Not through Projection's own forward: the weights W + s B A are formed, and the chain rule leads from their gradients to A and B.
    [Fact]
    public void ThePlainGraphOfAnAdapterIsThatOfItsSum()
    {
        using var scope = NewDisposeScope();
        var config = Everywhere() with { UseRslora = true };
        using var model = Adapted(config);
        var (batch, ids, _) = Batch(2, 9);
        using var merged = new CausalLM(model.Config, ScalarType.Float64);
        double s = config.LoraAlpha / Math.Sqrt(3);
        Assert.Equal(s, config.Scaling);
        var all = model.named_parameters().ToDictionary(p => p.name, p => (Tensor)p.parameter);
        Tensor? Of(string weight, string matrix) => all.GetValueOrDefault(weight.Replace(".weight", $".lora_{matrix}.weight")) ?? all.GetValueOrDefault(weight.Replace(".weight", $".lora_embedding_{matrix}.weight"));
        static Tensor Delta(string weight, Tensor ba) => weight.Contains("embed_tokens") ? ba.t() : ba;
        using (no_grad())
            foreach (var (name, p) in merged.named_parameters())
                p.copy_(Of(name, "A") is { } a ? all[name] + (s * Delta(name, Of(name, "B")!.mm(a))) : all[name]);
        Close(model.call(ids), merged.call(ids), 1e-12);
        model.ForwardBackward(batch, 1).Dispose();
        merged.ForwardBackward(batch, 1).Dispose();
        batch.Dispose();
        using var noGrad = no_grad();
        foreach (var (name, p) in merged.named_parameters().Where(p => Of(p.name, "A") is not null))
        {
            var dW = Delta(name, p.grad!) * s;
            Close(Of(name, "A")!.grad, Of(name, "B")!.t().mm(dW), 1e-10);
            Close(Of(name, "B")!.grad, dW.mm(Of(name, "A")!.t()), 1e-10);
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void DropoutDoesNotDependOnTheChunkAndItsGradientIsThatOfTheLoss(bool tied)
    {
        using var scope = NewDisposeScope();
        using var model = Adapted(Everywhere(dropout: 0.4), tied);
        var (batch, ids, _) = Batch(2, 35);
        double Step(ComputeOptions options)
        {
            random.manual_seed(8); // the seed of the masks is drawn from here
            using var loss = model.ForwardBackward(batch, 1, options);
            return loss.LossSum.item<double>();
        }
        double once = Step(new ComputeOptions(1000, RecomputePolicy.None));
        var want = GradientsOf(model);
        foreach (var options in new[] { new ComputeOptions(1, RecomputePolicy.Full), new ComputeOptions(7, RecomputePolicy.KeepAttention), new ComputeOptions(64) })
        {
            ClearGradients(model);
            Assert.Equal(once, Step(options), 1e-12 * once);
            foreach (var (name, gradient) in GradientsOf(model)) Close(gradient, want[name], 1e-11);
        }
        ClearGradients(model);
        model.ForwardBackward(batch, 1).Dispose(); // another draw
        Assert.Contains(GradientsOf(model), g => Difference(g.Value, want[g.Key]) > 0.1);

        // The derivative along a random direction, by a difference of losses under the same masks.
        var trained = model.named_parameters().Where(p => p.parameter.requires_grad).ToList();
        using var noGrad = no_grad();
        var direction = trained.ToDictionary(p => p.name, p => randn_like(p.parameter));
        double predicted = trained.Sum(p => (want[p.name]! * direction[p.name]).sum().item<double>());
        double At(double t)
        {
            foreach (var (name, p) in trained) p.add_(direction[name] * t);
            double loss = Step(new ComputeOptions(5));
            foreach (var (name, p) in trained) p.sub_(direction[name] * t);
            return loss;
        }
        double measured = ((8 * (At(1e-5) - At(-1e-5))) - (At(2e-5) - At(-2e-5))) / 12e-5;
        Assert.Equal(predicted, measured, 1e-7 * Math.Abs(predicted));

        model.eval();
        Assert.Equal(model.Evaluate(batch).LossSum, Step(new ComputeOptions()), 1e-9); // an evaluation drops nothing
        batch.Dispose();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void ANewAdapterChangesNothingAndFreezesTheRest(bool tied)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        using var model = new CausalLM(DecoderTests.Tiny(tied));
        var ids = Batch(2, 9).Ids;
        var before = model.call(ids);
        var names = model.named_parameters().Select(p => p.name).ToHashSet();
        model.AddAdapter(Everywhere());
        Close(model.call(ids), before, 0);
        var added = model.named_parameters().Where(p => !names.Contains(p.name)).ToList();
        Assert.Equal(2 * ((3 * 7) + 2), added.Count);
        Assert.Contains("model.layers.2.self_attn.q_proj.lora_A.weight", added.Select(p => p.name));
        Assert.Contains("lm_head.lora_B.weight", added.Select(p => p.name));
        Assert.All(model.named_parameters(), p => Assert.Equal(!names.Contains(p.name), p.parameter.requires_grad));
        Assert.Superset(names, model.named_parameters().Select(p => p.name).ToHashSet());
        var a = added.First(p => p.name.EndsWith("down_proj.lora_A.weight")).parameter;
        Assert.InRange(a.abs().max().item<float>(), 0.5 / Math.Sqrt(20), 1 / Math.Sqrt(20));
    }

    [Theory]
    [InlineData(ScalarType.Float64, 1e-12)]
    [InlineData(ScalarType.Float32, 2e-5)]
    [InlineData(ScalarType.BFloat16, 0.1)]
    public void MergedGivesTheSameAndIsSavedAsAModel(ScalarType dtype, double tolerance)
    {
        using var scope = NewDisposeScope();
        using var folder = new TemporaryFolder();
        using var model = Adapted(Everywhere(), dtype: dtype);
        var (batch, ids, _) = Batch(2, 12);
        var (logits, score) = (model.call(ids), model.Evaluate(batch));
        Assert.Contains("MergeAdapter", Assert.Throws<InvalidOperationException>(() => model.SavePretrained(folder.Path)).Message);
        Assert.Empty(Directory.GetFiles(folder.Path));
        model.MergeAdapter();
        Close(model.call(ids), logits, tolerance);
        Assert.Equal(score.LossSum, model.Evaluate(batch).LossSum, tolerance * score.LossSum);
        model.ForwardBackward(batch, 1).Dispose();
        Assert.All(model.parameters(), p => Assert.NotNull(p.grad));
        model.SavePretrained(folder.Path);
        using var loaded = Checkpoint.LoadPretrained(folder.Path);
        Close(loaded.call(ids), model.call(ids), 0);
        model.AddAdapter(new LoraConfig()); // and there is room for another
        batch.Dispose();
    }

    [Fact]
    public void AMergeIsRoundedOnce()
    {
        using var scope = NewDisposeScope();
        using var model = Adapted(new LoraConfig { R = 4, LoraAlpha = 16, TargetModules = ["down_proj"] }, dtype: ScalarType.BFloat16);
        var all = model.named_parameters().ToDictionary(p => p.name, p => p.parameter.to(ScalarType.Float64));
        string name = "model.layers.1.mlp.down_proj";
        var want = (all[$"{name}.weight"] + (4 * all[$"{name}.lora_B.weight"].mm(all[$"{name}.lora_A.weight"]))).to(ScalarType.BFloat16);
        model.MergeAdapter();
        var got = model.named_parameters().First(p => p.name == $"{name}.weight").parameter;
        Assert.InRange(got.ne(want).sum().item<long>(), 0, 1); // float32's own rounding may turn one
    }

    [Fact]
    public void TheAdapterOfABFloat16ModelIsFloat32AndItsGradientsAreNear()
    {
        using var scope = NewDisposeScope();
        using var narrow = Adapted(Everywhere(), dtype: ScalarType.BFloat16);
        using var wide = Adapted(Everywhere());
        using (no_grad())
            foreach (var ((_, a), (_, b)) in wide.named_parameters().Zip(narrow.named_parameters())) a.copy_(b);
        var (batch, ids, labels) = Batch(2, 40);
        wide.ForwardBackward(batch, 0.1).Dispose();
        PlainDecoder.LossSum(narrow, ids, labels).mul(0.1).backward();
        var (want, plain) = (GradientsOf(wide), GradientsOf(narrow));
        ClearGradients(narrow);
        narrow.ForwardBackward(batch, 0.1, new ComputeOptions(4)).Dispose();
        batch.Dispose();
        var got = GradientsOf(narrow).Where(g => g.Value is not null).ToDictionary();
        Assert.All(got, g => Assert.Equal(ScalarType.Float32, g.Value!.dtype));
        Assert.All(narrow.named_parameters().Where(p => p.name.Contains("lora_")), p => Assert.Equal(ScalarType.Float32, p.parameter.dtype));
        double Error(Dictionary<string, Tensor?> gradients) =>
            Math.Sqrt(got.Keys.Sum(n => Math.Pow(((gradients[n]!.to(ScalarType.Float64) - want[n]!).norm() / want[n]!.norm()).item<double>(), 2)) / got.Count);
        Assert.InRange(Error(got), 0, 1.25 * Error(plain));
    }

    [Theory]
    [InlineData(false, ScalarType.Float32)]
    [InlineData(true, ScalarType.Float64)]
    [InlineData(true, ScalarType.BFloat16)]
    public void SaveAndLoadGiveTheSameAdapter(bool tied, ScalarType dtype)
    {
        using var scope = NewDisposeScope();
        using var folder = new TemporaryFolder();
        var config = Everywhere(dropout: 0.1) with { UseRslora = true, LayersToTransform = null, BaseModelNameOrPath = "some/model" };
        using var model = Adapted(config, tied, dtype);
        model.SaveAdapter(folder.Path);
        using (var file = SafetensorsReader.Open(folder["adapter_model.safetensors"]))
        {
            Assert.Contains("base_model.model.model.embed_tokens.lora_embedding_A", file.Names);
            Assert.Contains("base_model.model.lm_head.lora_B.weight", file.Names);
            Assert.Contains("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", file.Names);
        }
        random.manual_seed(3);
        using var other = new CausalLM(model.Config, dtype);
        other.LoadAdapter(folder.Path);
        Assert.Equal(config.ToJson(), other.Adapter!.ToJson());
        var ids = Batch(1, 8).Ids;
        Close(other.call(ids), model.call(ids), 0);
        foreach (var ((name, a), (_, b)) in model.named_parameters().Zip(other.named_parameters()))
            if (name.Contains("lora_")) Close(b, a, 0);
    }

    [Fact]
    public void OnlyTheLayersAskedForAreAdapted()
    {
        using var folder = new TemporaryFolder();
        using var model = Adapted(new LoraConfig { TargetModules = ["v_proj"], LayersToTransform = [0, 2] });
        Assert.Equal(["model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.v_proj"],
            model.named_parameters().Where(p => p.name.EndsWith("lora_A.weight")).Select(p => p.name.Replace(".lora_A.weight", "")).Order());
        model.SaveAdapter(folder.Path);
        Assert.Equal([0, 2], LoraConfig.FromPretrained(folder.Path).LayersToTransform!);
    }

    [Fact]
    public void ATiedAdapterOfTheHeadOrTheEmbeddingIsNotMerged()
    {
        foreach (string target in new[] { "lm_head", "embed_tokens" })
        {
            using var model = Adapted(new LoraConfig { TargetModules = [target] }, tied: true);
            Assert.Contains("tie_word_embeddings", Assert.Throws<InvalidOperationException>(model.MergeAdapter).Message);
            Assert.NotNull(model.Adapter);
        }
        using var inner = Adapted(new LoraConfig(), tied: true);
        inner.MergeAdapter();
        Assert.Null(inner.Adapter);
    }

    [Fact]
    public void WhatCannotBeAdaptedIsNamed()
    {
        using var model = new CausalLM(DecoderTests.Tiny());
        string Refused(LoraConfig config)
        {
            string message = Assert.Throws<ArgumentException>(() => model.AddAdapter(config)).Message;
            Assert.Null(model.Adapter);
            Assert.All(model.parameters(), p => Assert.True(p.requires_grad));
            return message;
        }
        Assert.Contains("'c_attn'", Refused(new LoraConfig { TargetModules = ["q_proj", "c_attn"] }));
        Assert.Contains("'mlp'", Refused(new LoraConfig { TargetModules = ["mlp"] }));
        Assert.Contains("'lm_head'", Refused(new LoraConfig { TargetModules = ["q_proj", "lm_head"], LayersToTransform = [1] }));
        Assert.Contains("layer 3", Refused(new LoraConfig { LayersToTransform = [3] }));
        Assert.Contains("target_modules", Refused(new LoraConfig { TargetModules = [] }));
        Assert.Contains("r is 0", Refused(new LoraConfig { R = 0 }));
        Assert.Contains("lora_dropout is 1", Refused(new LoraConfig { LoraDropout = 1 }));
        Assert.Contains("lora_alpha", Refused(new LoraConfig { LoraAlpha = double.NaN }));
        Assert.Contains("no adapter", Assert.Throws<InvalidOperationException>(model.MergeAdapter).Message);
        Assert.Contains("no adapter", Assert.Throws<InvalidOperationException>(() => model.SaveAdapter("nowhere")).Message);
        model.AddAdapter(new LoraConfig());
        Assert.Contains("already", Assert.Throws<InvalidOperationException>(() => model.AddAdapter(new LoraConfig())).Message);
    }

    [Theory]
    [InlineData("\"use_dora\": true", "use_dora")]
    [InlineData("\"bias\": \"all\"", "bias \"all\"")]
    [InlineData("\"modules_to_save\": [\"lm_head\"]", "modules_to_save")]
    [InlineData("\"rank_pattern\": {\"q_proj\": 2}", "rank_pattern")]
    [InlineData("\"alpha_pattern\": {\"q_proj\": 2}", "alpha_pattern")]
    [InlineData("\"fan_in_fan_out\": true", "fan_in_fan_out")]
    [InlineData("\"layers_pattern\": \"h\"", "layers_pattern")]
    [InlineData("\"peft_type\": \"IA3\"", "peft_type \"IA3\"")]
    [InlineData("\"task_type\": \"SEQ_CLS\"", "task_type")]
    [InlineData("\"init_lora_weights\": \"pissa\"", "pissa")]
    [InlineData("\"target_modules\": \".*q_proj\"", "target_modules")]
    [InlineData("\"target_modules\": null", "lacks target_modules")]
    [InlineData("\"target_modules\": []", "target_modules")]
    [InlineData("\"r\": -1", "r is -1")]
    [InlineData("\"r\": \"many\"", "not a valid adapter_config.json")]
    [InlineData("\"lora_dropout\": 1.5", "lora_dropout is 1.5")]
    public void AConfigurationThatIsNotComputedIsRefusedByName(string change, string said)
    {
        using var folder = new TemporaryFolder();
        var json = JsonNode.Parse(new LoraConfig().ToJson())!.AsObject();
        foreach (var (key, value) in JsonNode.Parse($"{{{change}}}")!.AsObject()) json[key] = value?.DeepClone();
        File.WriteAllText(folder["adapter_config.json"], json.ToJsonString());
        var error = Assert.ThrowsAny<Exception>(() => LoraConfig.FromPretrained(folder.Path));
        Assert.True(error is NotSupportedException or InvalidDataException);
        Assert.Contains(said, error.Message);
        Assert.Contains("adapter_config.json", error.Message);
    }

    [Fact]
    public void PeftsDefaultsAndAllLinearAreUnderstood()
    {
        using var folder = new TemporaryFolder();
        Assert.Contains("adapter_config.json", Assert.Throws<FileNotFoundException>(() => LoraConfig.FromPretrained(folder.Path)).Message);
        File.WriteAllText(folder["adapter_config.json"], "{\"peft_type\": \"LORA\", \"target_modules\": \"all-linear\", \"layers_to_transform\": 1}");
        var config = LoraConfig.FromPretrained(folder.Path);
        Assert.Equal((8, 8.0, 0.0, false, 1.0), (config.R, config.LoraAlpha, config.LoraDropout, config.UseRslora, config.Scaling));
        Assert.Equal(new LoraConfig().TargetModules, config.TargetModules);
        Assert.Equal([1], config.LayersToTransform!);
    }

    [Fact]
    public void AdapterFilesThatDoNotFitAreNamedAndChangeNothing()
    {
        using var folder = new TemporaryFolder();
        using var scope = NewDisposeScope();
        using (var source = Adapted(new LoraConfig { R = 3, TargetModules = ["q_proj", "embed_tokens"] }, dtype: ScalarType.Float32)) source.SaveAdapter(folder.Path);
        string path = folder["adapter_model.safetensors"];
        Dictionary<string, Tensor> tensors;
        using (var file = SafetensorsReader.Open(path)) tensors = file.Names.ToDictionary(n => n, file.Read);
        using var model = new CausalLM(DecoderTests.Tiny());
        void Refused(string said, Action<Dictionary<string, Tensor>> change)
        {
            Dictionary<string, Tensor> changed = new(tensors);
            change(changed);
            SafetensorsWriter.Save(path, changed.Select(t => (t.Key, t.Value)));
            string message = Assert.Throws<InvalidDataException>(() => model.LoadAdapter(folder.Path)).Message;
            Assert.Contains(said, message);
            Assert.Contains(folder.Path, message);
            Assert.Null(model.Adapter);
            Assert.All(model.named_parameters(), p => Assert.True(p.parameter.requires_grad && !p.name.Contains("lora")));
        }
        const string Prefix = "base_model.model.model.", A = Prefix + "layers.1.self_attn.q_proj.lora_A.weight", Base = Prefix + "embed_tokens.base_layer.weight";
        Refused($"lacks the tensor '{A}'", t => t.Remove(A));
        Refused($"'{A}' is [3, 11]", t => t[A] = zeros(3, 11));
        Refused("'other'", t => t["other"] = zeros(1));
        Refused($"'{Base}' differs", t => t[Base] = zeros(31, 12));
        // PEFT writes the embedding below an adapter, too: the model's own is no fault.
        SafetensorsWriter.Save(path, [.. tensors.Select(t => (t.Key, t.Value)), (Base, model.Embedding.Weight.detach())]);
        model.LoadAdapter(folder.Path);
        Assert.NotNull(model.Adapter);

        SafetensorsWriter.Save(path, tensors.Select(t => (t.Key, t.Value)));
        using var shallow = new CausalLM(DecoderTests.Tiny() with { NumHiddenLayers = 2 });
        Assert.Contains("no place for", Assert.Throws<InvalidDataException>(() => shallow.LoadAdapter(folder.Path)).Message);
        File.WriteAllText(folder["adapter_config.json"], new LoraConfig { TargetModules = ["c_attn"] }.ToJson());
        Assert.Contains("'c_attn'", Assert.Throws<InvalidDataException>(() => shallow.LoadAdapter(folder.Path)).Message);
        File.Delete(path);
        Assert.Contains("adapter_model.safetensors", Assert.Throws<FileNotFoundException>(() => shallow.LoadAdapter(folder.Path)).Message);
    }

    [Fact]
    public void MemoryOfAnAdaptedStepHoldsNoGradientOfAWeight()
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        using var model = new CausalLM(DecoderConfig.Llama(8192, 64, 2048, 2, 2, 1));
        model.AddAdapter(new LoraConfig { R = 2, TargetModules = s_everywhere, LoraDropout = 0.1 });
        long[] ids = [.. Enumerable.Range(0, 256).Select(i => (long)(i * 7 % 8192))];
        using var batch = new TokenBatch([new TokenSequence(ids, ids)]);
        var options = new ComputeOptions(8, RecomputePolicy.Full);
        model.ForwardBackward(batch, 1, options).Dispose();
        long before = TensorMemory.LiveBytes;
        TensorMemory.ResetPeak();
        model.ForwardBackward(batch, 1, options).Dispose();
        Assert.InRange(TensorMemory.PeakBytes - before, 0, 8192 * 64 * 4 * 3 / 4); // one matrix of the head's size is 2 MiB
    }
}
