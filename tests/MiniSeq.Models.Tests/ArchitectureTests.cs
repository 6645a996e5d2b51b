using System.Text.Json.Nodes;
using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Models.Tests;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class ArchitectureTests
{
    private static readonly long[] s_ids = [3, 17, 8, 25, 3, 1, 30, 12, 4, 4, 19, 7, 22, 9, 2, 11, 28, 5, 16, 3];

    /// <summary>A configuration as its family has it, small.</summary>
    private static DecoderConfig Small(string type) => DecoderTests.Tiny() with { ModelType = type, NumAttentionHeads = 4, NumKeyValueHeads = 2, HeadDim = 8 };

    public static TheoryData<string, DecoderConfig> Families => new()
    {
        { "llama with biases", Small("llama") with { QkvBias = true, OutputBias = true, MlpBias = true } },
        { "linear scaling", Small("llama") with { RopeScaling = new LinearRopeScaling(4) } },
        { "Llama 3.1's scaling", Small("llama") with { RopeScaling = new Llama3RopeScaling(8, 1, 4, 16), RopeTheta = 5e5 } },
        { "YaRN", Small("qwen2") with { QkvBias = true, RopeScaling = new YarnRopeScaling(4, 64), RopeTheta = 100 } },
        { "YaRN with a given factor", Small("llama") with { RopeScaling = new YarnRopeScaling(2, 512, 16, 2, 1.3), RopeTheta = 1e4 } },
        { "Mistral", Small("mistral") with { SlidingWindow = 5 } },
        { "Qwen2 that slides above a layer", Small("qwen2") with { QkvBias = true, SlidingWindow = 4, LayerTypes = [LayerType.FullAttention, LayerType.FullAttention, LayerType.SlidingAttention] } },
        { "Qwen3", Small("qwen3") with { QkNorm = true, HeadDim = 6, RopeTheta = 1e6, TieWordEmbeddings = true } },
        { "Qwen3 with biases", Small("qwen3") with { QkNorm = true, QkvBias = true, OutputBias = true } },
        { "Gemma 2", Small("gemma2") with
            {
                RmsNormUnitOffset = true, PostNorms = true, ScaleEmbeddings = true, HiddenAct = Activation.GeluTanh, QueryPreAttnScalar = 13, AttnLogitSoftcapping = 5,
                FinalLogitSoftcapping = 3, SlidingWindow = 6, LayerTypes = [LayerType.SlidingAttention, LayerType.FullAttention, LayerType.SlidingAttention], TieWordEmbeddings = true,
            } },
        { "Phi-3", Small("phi3") with { SlidingWindow = 7, PadTokenId = 3 } },
    };

    [Theory, MemberData(nameof(Families))]
    public void LogitsAreThoseOfTheWrittenForm(string name, DecoderConfig config)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(name.Length);
        using var model = new CausalLM(config, ScalarType.Float64);
        using (no_grad())
            foreach (var p in model.parameters().Where(p => p.dim() == 1)) p.add_(randn_like(p), 0.3);
        Close(model.call(tensor(s_ids).unsqueeze(0)), tensor(new WrittenDecoder(model).Logits(s_ids)).unsqueeze(0), 1e-6); // angles are float32
    }

    [Theory, MemberData(nameof(Families))]
    public void ACheckpointKeepsEverySetting(string name, DecoderConfig config)
    {
        using var scope = NewDisposeScope();
        using var folder = new TemporaryFolder();
        using var model = new CausalLM(config);
        model.SavePretrained(folder.Path);
        using var loaded = Checkpoint.LoadPretrained(folder.Path);
        Assert.Equal(config.ToJson(ScalarType.Float32), loaded.Config.ToJson(ScalarType.Float32));
        var ids = tensor(s_ids).unsqueeze(0);
        Close(loaded.call(ids), model.call(ids), 0);
        Assert.Equal(name == "Phi-3", File.ReadAllText(folder["model.safetensors"]).Contains("qkv_proj"));
    }

    [Theory]
    [InlineData("llama3_1")]
    [InlineData("mistral")]
    [InlineData("qwen2")]
    [InlineData("gemma2")]
    [InlineData("phi3")]
    public void TheWrittenFormIsHuggingFaces(string name)
    {
        using var scope = NewDisposeScope();
        string folder = Shared.Path($"reference/{name}");
        using var model = Checkpoint.LoadPretrained(folder);
        using var expected = SafetensorsReader.Open(Path.Combine(folder, "expected.safetensors"));
        var ids = expected.Read("input_ids")[0].data<long>().ToArray();
        Close(tensor(new WrittenDecoder(model).Logits(ids)), expected.Read("logits")[0], 1e-5);
    }

    [Theory, MemberData(nameof(Families))]
    public void AContinuationDoesNotDependOnTheCache(string name, DecoderConfig config)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(name.Length);
        using var model = new CausalLM(config, ScalarType.Float64);
        List<int> ids = [3, 17, 8];
        var cached = model.Generate([[.. ids]], new GenerationOptions { MaxNewTokens = 15, EosTokenIds = [] })[0];
        for (int i = 0; i < 15; i++) ids.Add((int)model.call(tensor((long[])[.. ids.Select(id => (long)id)]).unsqueeze(0))[0][^1].argmax().item<long>());
        Assert.Equal(ids[3..], cached);
    }

    // What transformers takes where a file is silent.
    [Fact]
    public void DefaultsAreThoseOfTheFamily()
    {
        DecoderConfig Read(string type, params (string Name, JsonNode? Value)[] more)
        {
            using var folder = new TemporaryFolder();
            var json = new JsonObject { ["model_type"] = type, ["vocab_size"] = 31, ["hidden_size"] = 64, ["intermediate_size"] = 20, ["num_hidden_layers"] = 4, ["num_attention_heads"] = 32 };
            foreach (var (name, value) in more) json[name] = value;
            File.WriteAllText(folder["config.json"], json.ToJsonString());
            return DecoderConfig.FromPretrained(folder.Path);
        }
        var mistral = Read("mistral");
        Assert.Equal((8, 2, 4096, 131072, false), (mistral.NumKeyValueHeads, mistral.HeadDim, mistral.SlidingWindow!.Value, mistral.MaxPositionEmbeddings, mistral.TieWordEmbeddings));
        Assert.Null(Read("mistral", ("sliding_window", null)).SlidingWindow);
        var qwen2 = Read("qwen2", ("sliding_window", 100));
        Assert.Equal((true, false, null), (qwen2.QkvBias, qwen2.OutputBias, qwen2.SlidingWindow));
        Assert.Equal([null, null, 100, 100], Windows(Read("qwen2", ("sliding_window", 100), ("use_sliding_window", true), ("max_window_layers", 2))));
        Assert.Equal((true, 128, false), (Read("qwen3").QkNorm, Read("qwen3").HeadDim, Read("qwen3").QkvBias));
        var gemma = Read("gemma2");
        Assert.Equal((true, 256, 4, 256.0, 50.0, 30.0), (gemma.TieWordEmbeddings, gemma.HeadDim, gemma.NumKeyValueHeads, gemma.QueryPreAttnScalar!.Value, gemma.AttnLogitSoftcapping!.Value, gemma.FinalLogitSoftcapping!.Value));
        Assert.Equal([4096, null, 4096, null], Windows(gemma));
        Assert.Equal([null, 4096, null, null], Windows(Read("gemma2", ("layer_types", new JsonArray("full_attention", "sliding_attention", "full_attention", "full_attention")))));
        Assert.Null(Read("gemma2", ("attn_logit_softcapping", null)).AttnLogitSoftcapping);
        Assert.Equal((1e-5, null, 2), (Read("phi3").RmsNormEps, Read("phi3").SlidingWindow, Read("phi3").HeadDim));
        Assert.Equal(new YarnRopeScaling(4, 32768), Read("qwen2", ("rope_scaling", JsonNode.Parse("""{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}"""))).RopeScaling);
        var newer = Read("llama", ("rope_parameters", JsonNode.Parse("""{"rope_type": "linear", "factor": 2, "rope_theta": 7}""")));
        Assert.Equal((new LinearRopeScaling(2), 7.0), (newer.RopeScaling, newer.RopeTheta));
        Assert.Null(Read("llama", ("rope_scaling", JsonNode.Parse("""{"rope_type": "default"}"""))).RopeScaling);

        static int?[] Windows(DecoderConfig c) => [.. Enumerable.Range(0, c.NumHiddenLayers).Select(c.WindowOf)];
    }

    [Fact]
    public void ASettingThatTheFamilyHasNoNameForIsNotLost()
    {
        string Said(DecoderConfig config) => Assert.Throws<NotSupportedException>(() => config.ToJson(ScalarType.Float32)).Message;
        Assert.Contains("QkNorm", Said(DecoderTests.Tiny() with { QkNorm = true }));
        Assert.Contains("SlidingWindow", Said(DecoderTests.Tiny() with { SlidingWindow = 5 }));
        Assert.Contains("OutputBias", Said(DecoderTests.Tiny() with { QkvBias = true }));
        Assert.Contains("llama, mistral", Said(DecoderTests.Tiny() with { ModelType = "gpt2" }));
    }
}
