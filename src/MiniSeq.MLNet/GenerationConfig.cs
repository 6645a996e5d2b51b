using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniSeq.Models;

namespace MiniSeq.MLNet;

/// <summary>Hugging Face's <c>generation_config.json</c>: other programs then write as this model does, and the tokenizer finds its special tokens again.</summary>
internal static class GenerationConfig
{
    private static readonly JsonSerializerOptions s_json = new() { WriteIndented = true };

    public static void Write(string folder, HuggingFaceTokenizer tokenizer, GenerationOptions options, int? endOfTurnTokenId)
    {
        var json = new JsonObject { ["max_new_tokens"] = options.MaxNewTokens, ["do_sample"] = options.DoSample };
        if (options.DoSample)
        {
            json["temperature"] = options.Temperature;
            json["top_k"] = options.TopK;
            json["top_p"] = options.TopP;
        }
        if (tokenizer.BosTokenId is { } bos) json["bos_token_id"] = bos;
        if (tokenizer.PadTokenId is { } pad) json["pad_token_id"] = pad;
        // The first is what ends a training text.
        int[] eos = [.. tokenizer.EosTokenId is { } first ? new[] { first } : [], .. tokenizer.EosTokenIds.Union(endOfTurnTokenId is { } end ? [end] : []).Where(id => id != tokenizer.EosTokenId).Order()];
        if (eos.Length > 0) json["eos_token_id"] = new JsonArray([.. eos.Select(id => (JsonNode)id)]);
        using var files = new PendingFiles();
        files.Add(Path.Combine(folder, "generation_config.json")).Write(Encoding.UTF8.GetBytes(json.ToJsonString(s_json)));
        files.Commit();
    }
}
