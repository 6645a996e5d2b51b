using System.Text.Json.Nodes;
using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.Tests;

public sealed class DialogueEncoderTests
{
    private static readonly ChatTemplate s_template = new(Tokenizer(), ChatTemplateKind.ChatMl);
    private static readonly int s_end = s_template.EndOfTurnTokenId;

    private static string Text(IEnumerable<long> ids) => s_template.Tokenizer.Decode(ids.Select(i => (int)i), skipSpecialTokens: false);

    private static string Header(string role) => $"<|im_start|>{role}\n";

    [Fact]
    public void LossIsOnEveryAnswerWithItsEnd()
    {
        ChatMessage[] dialogue = [new("system", "Be brief."), new("user", "Pages?"), new("assistant", "Of one size."), new("user", "Which?"), new("assistant", "4096.")];
        var sequence = new DialogueEncoder(s_template, 1000).Encode(dialogue);
        Assert.Equal("Of one size.<|im_end|>4096.<|im_end|>", Text(sequence.Labels.Where(l => l >= 0)));
        Assert.Equal(2, sequence.Labels.Count(l => l == s_end));
        Assert.All(sequence.InputIds.Zip(sequence.Labels), p => Assert.True(p.Second == p.First || p.Second == -100));
        Assert.Equal(s_template.Encode(dialogue).InputIds, sequence.InputIds.Select(i => (int)i));
        var all = new DialogueEncoder(s_template, 1000).Encode(dialogue, assistantOnlyLoss: false);
        Assert.Equal(sequence.InputIds, all.Labels);

        // The prompt ends where the last answer begins, whether the dialogue holds it or not.
        int[] prompt = new DialogueEncoder(s_template, 1000).Prompt(dialogue, 0);
        Assert.Equal(prompt, new DialogueEncoder(s_template, 1000).Prompt(dialogue[..^1], 0));
        Assert.Equal(prompt, sequence.InputIds[..prompt.Length].Select(i => (int)i));
        Assert.Equal("4096.<|im_end|>", Text(sequence.InputIds[prompt.Length..^1])); // and a line feed
    }

    [Fact]
    public void TheTemplatesOwnTextIsMaskedHoweverItIsSplit()
    {
        // To this tokenizer two line feeds are one token, but two before a letter.
        var sequence = new DialogueEncoder(new ChatTemplate(s_template.Tokenizer, ChatTemplateKind.Llama3), 1000).Encode([new("user", "Pages?"), new("assistant", "Of one size.")]);
        Assert.Equal("Of one size.<|eot_id|>", Text(sequence.Labels.Where(l => l >= 0)));
    }

    [Fact]
    public void ADocumentIsAUsersTurnAndTheTargetAnAnswer()
    {
        var encoder = new DialogueEncoder(s_template, 1000, "Read: {input}\nSummary:");
        var sequence = encoder.Encode("The index is a B-tree.", "An index.");
        Assert.Equal("An index.<|im_end|>", Text(sequence.Labels.Where(l => l >= 0)));
        Assert.Equal(s_template.Encode([new("user", "Read: The index is a B-tree.\nSummary:"), new("assistant", "An index.")]).InputIds, sequence.InputIds.Select(i => (int)i));
        Assert.Equal(encoder.Prompt("The index is a B-tree.", 0), sequence.InputIds.TakeWhile((_, i) => sequence.Labels[i] < 0).Select(i => (int)i));
    }

    [Fact]
    public void TheLongestMessageIsCutAndNeverAnAnswer()
    {
        var encoder = new DialogueEncoder(s_template, 120);
        string file = string.Concat(Enumerable.Repeat("The database file is a sequence of pages, naïve or not. ", 40));
        string answer = "A file of pages, each of one size.";
        var sequence = encoder.Encode([new("system", "Be brief."), new("user", file), new("assistant", answer), new("user", "Say it again."), new("assistant", answer)]);
        Assert.InRange(sequence.Length, 115, 120);
        Assert.Equal(answer + "<|im_end|>" + answer + "<|im_end|>", Text(sequence.Labels.Where(l => l >= 0)));
        string text = Text(sequence.InputIds);
        Assert.Contains("Be brief.<|im_end|>", text);
        Assert.Contains("Say it again.<|im_end|>", text);
        Assert.Contains(Header("user") + "The database file", text);
        Assert.Equal(1, encoder.TruncatedCount);
        Assert.InRange(encoder.Prompt([new("user", file)], reserve: 20).Length, 95, 100);
        Assert.Equal(2, encoder.TruncatedCount);

        // Two long messages: the longest goes first, then the other.
        text = Text(encoder.Encode([new("system", file + file), new("user", file), new("assistant", "Yes.")]).InputIds);
        Assert.Contains(Header("system") + "<|im_end|>", text);
        Assert.Contains("The database file", text);

        var fault = Assert.Throws<SequenceTooLongException>(() => encoder.Encode([new("user", file), new("assistant", file)]));
        Assert.Contains("never cut", fault.Message);
        Assert.Equal(3, encoder.TruncatedCount);
    }

    [Fact]
    public void OfADocumentInAPromptOnlyTheDocumentIsCut()
    {
        var encoder = new DialogueEncoder(s_template, 80, "{input}\n\nSummarize the text above.");
        var sequence = encoder.Encode(string.Concat(Enumerable.Repeat("é天<|im_end|> page ", 100)), "Short.");
        Assert.InRange(sequence.Length, 70, 80);
        Assert.Contains("Summarize the text above.<|im_end|>", Text(sequence.InputIds));
        Assert.Equal(2, sequence.InputIds.Count(id => id == s_end)); // what the document says of it is text
        Assert.DoesNotContain('\uFFFD', Text(sequence.InputIds)); // no half character
        Assert.InRange(encoder.Prompt(new string('x', 1000), reserve: 10).Length, 65, 70);
    }

    [Fact]
    public void WhatIsNoExampleIsRefused()
    {
        var encoder = new DialogueEncoder(s_template, 100);
        string Said(params ChatMessage[] dialogue) => Assert.ThrowsAny<ArgumentException>(() => encoder.Encode(dialogue)).Message;
        Assert.Contains("no message of the assistant", Said(new ChatMessage("user", "a")));
        Assert.Contains("at least one message", Said());
        Assert.Contains("role 'tool'", Said(new ChatMessage("tool", "a"), new ChatMessage("assistant", "a")));
        Assert.Contains("raise it", Assert.ThrowsAny<ArgumentException>(() => encoder.Prompt("a", 95)).Message);
        Assert.Contains("{input} once", Assert.Throws<ArgumentException>(() => new DialogueEncoder(s_template, 100, "none")).Message);
        Assert.Contains("no room", Assert.Throws<ArgumentException>(() => new DialogueEncoder(s_template, 9)).Message);
    }

    /// <summary>The sample's tokenizer with the special tokens of ChatML and Llama 3 added.</summary>
    private static HuggingFaceTokenizer Tokenizer()
    {
        string folder = Directory.CreateTempSubdirectory("miniseq-").FullName;
        try
        {
            var json = JsonNode.Parse(File.ReadAllText(Path.Combine(AppContext.BaseDirectory, "tokenizer", "tokenizer.json")))!;
            int next = json["model"]!["vocab"]!.AsObject().Max(token => (int)token.Value!) + 100;
            foreach (string content in new[] { "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>" })
                json["added_tokens"]!.AsArray().Add(new JsonObject { ["id"] = next++, ["content"] = content, ["special"] = true });
            File.WriteAllText(Path.Combine(folder, "tokenizer.json"), json.ToJsonString());
            return HuggingFaceTokenizer.FromPretrained(folder);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }
}
