using System.Text.Json;
using System.Text.Json.Nodes;
using Microsoft.ML;
using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet.Tests;

public sealed class ChatTests
{
    private const int MaxLength = 120;
    private static readonly string s_dialogue = Json(("system", "Be brief."), ("user", "Which letter?"), ("assistant", "a"), ("user", "And then?"), ("assistant", "bc"));

    [Fact]
    public void ADocumentAndItsLabelAreTwoTurns()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        var rows = Tiny.Rows(ml);
        using var model = ml.MiniSeq().FineTune(Options()).Fit(rows);

        var encoder = new DialogueEncoder(new ChatTemplate(Tiny.Tokenizer, ChatTemplateKind.ChatMl), MaxLength, new FineTuneOptions().PromptTemplate);
        var expected = Trainer.Evaluate(model.Model, [.. ml.Data.CreateEnumerable<Row>(rows, false).Select(r => encoder.Encode(r.Document, r.Summary))]);
        var metrics = ml.MiniSeq().Evaluate(rows, model);
        Assert.Equal((expected.Loss, 20), (metrics.Loss, metrics.TokenCount)); // of each row one letter and the end of the turn

        var texts = Tiny.Texts(ml, model.Transform(rows));
        int[] prompt = encoder.Prompt("document 0 says a", 6);
        Assert.Equal("<|im_start|>user\ndocument 0 says a\n\nSummary:\n<|im_end|>\n<|im_start|>assistant\n", Tiny.Tokenizer.Decode(prompt, skipSpecialTokens: false));
        int[] written = model.Model.Generate([prompt], new GenerationOptions { MaxNewTokens = 6, EosTokenIds = [256, Tiny.EndOfTurn] })[0];
        Assert.Equal(Tiny.Tokenizer.Decode(written).Trim(), texts[0]);

        ml.MiniSeq().Save(model, rows.Schema, folder["model.zip"]);
        var loaded = ml.MiniSeq().Load(folder["model.zip"], out _);
        Assert.Equal(texts, Tiny.Texts(ml, loaded.Transform(rows)));
        using var typed = ml.MiniSeq().FromModel(loaded);
        Assert.Equal(texts, Tiny.Texts(ml, typed.Transform(rows)));
        Assert.Equal(metrics.Loss, ml.MiniSeq().Evaluate(rows, loaded).Loss);
    }

    [Fact]
    public void AnInputColumnAloneHoldsDialogues()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        var rows = Dialogues(ml, s_dialogue, Json(("user", "x"), ("assistant", "y")), "");
        using var model = ml.MiniSeq().FineTune(Options(dialogues: true)).Fit(rows);
        Assert.Equal(2 + 3 + 2, ml.MiniSeq().Evaluate(rows, model).TokenCount); // three answers, each with its end; the empty row is skipped

        // The last answer is written anew, whether the row has it or not.
        var texts = Tiny.Texts(ml, model.Transform(rows));
        Assert.Equal(texts[0], model.Generate(Json(("system", "Be brief."), ("user", "Which letter?"), ("assistant", "a"), ("user", "And then?"))));
        Assert.Equal("", texts[2]);

        ml.MiniSeq().Save(model, rows.Schema, folder["model.zip"]);
        var loaded = ml.MiniSeq().Load(folder["model.zip"], out _);
        Assert.Equal(texts, Tiny.Texts(ml, loaded.Transform(rows)));
        Assert.Equal(ml.MiniSeq().Evaluate(rows, model).Loss, ml.MiniSeq().Evaluate(rows, loaded).Loss);
        ml.MiniSeq().FromModel(loaded).Dispose();
    }

    [Fact]
    public void TheModelLearnsToEndItsTurn()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        var options = Options(dialogues: true);
        options.Training = new TrainingOptions { MaxSteps = 80, LearningRate = 0.02 };
        var rows = Dialogues(ml, Json(("user", "x"), ("assistant", "yes")));
        using var model = ml.MiniSeq().FineTune(options).Fit(rows);
        Assert.Equal(["yes"], Tiny.Texts(ml, model.Transform(rows)));

        // Other programs stop there, too.
        model.SavePretrained(folder.Path);
        var config = JsonNode.Parse(File.ReadAllText(folder["generation_config.json"]))!;
        Assert.Equal([256, Tiny.EndOfTurn], config["eos_token_id"]!.AsArray().Select(id => (int)id!));
    }

    [Fact]
    public void WrongRowsAreNamed()
    {
        var ml = new MLContext(1);
        string good = Json(("user", "x"), ("assistant", "y"));
        string Said(params string[] dialogues) => Assert.Throws<ArgumentException>(() => ml.MiniSeq().FineTune(Options(dialogues: true)).Fit(Dialogues(ml, dialogues))).Message;
        Assert.StartsWith("Row 1: A dialogue is a JSON list", Said(good, "plain text"));
        Assert.StartsWith("Row 2: Message 0 has the role 'human'", Said(good, good, Json(("human", "x"), ("assistant", "y"))));
        Assert.StartsWith("Row 0: The dialogue has no message of the assistant", Said(Json(("user", "x"))));
        Assert.StartsWith("No training row is left: 0 skipped for an empty text, 1 because", Said(Json(("user", "x"), ("assistant", new string('y', 200)))));
        Assert.StartsWith("No training row is left: 0 skipped for an empty text, 1 because", Said(Json(("assistant", new string('y', 200)))));

        using var model = ml.MiniSeq().FineTune(Options(dialogues: true)).Fit(Dialogues(ml, good));
        var rows = Dialogues(ml, good, good, good, good, good, "[]"); // in the second batch
        Assert.StartsWith("Row 5: A dialogue needs at least one message", Assert.Throws<ArgumentException>(() => Tiny.Texts(ml, model.Transform(rows))).Message);
        Assert.StartsWith("A dialogue is", Assert.Throws<ArgumentException>(() => model.Generate("plain text")).Message);
    }

    [Fact]
    public void ATemplateOfAnotherFamilyIsRefusedBeforeAnyRowIsRead()
    {
        var ml = new MLContext(1);
        var options = Options();
        options.ChatTemplate = ChatTemplateKind.Llama3;
        var estimator = ml.MiniSeq().FineTune(options);
        Assert.Contains("no token <|begin_of_text|>", Assert.Throws<ArgumentException>(() => estimator.Fit(Tiny.Rows(ml))).Message);
        (options.ChatTemplate, options.MaxLength) = (ChatTemplateKind.ChatMl, 34);
        Assert.Contains("are left of the maximum length of 34", Assert.ThrowsAny<ArgumentException>(() => ml.MiniSeq().FineTune(options).Fit(Tiny.Rows(ml))).Message);
    }

    [Fact]
    public void TheManifestNamesTheTemplateAndOlderOnesAreRead()
    {
        var ml = new MLContext(1);
        using var model = ml.MiniSeq().FineTune(Options()).Fit(Tiny.Rows(ml));
        string json = new Manifest(1, model.Session.Settings, "/folder", new Dictionary<string, FileSeal>()).ToJson();
        Assert.Contains("\"ChatTemplate\":\"ChatMl\"", json);
        Assert.Equal(ChatTemplateKind.ChatMl, Manifest.Parse(json.AsMemory()).Settings.ChatTemplate);
        Assert.Null(Manifest.Parse(json.Replace("\"ChatTemplate\":\"ChatMl\",", "", StringComparison.Ordinal).AsMemory()).Settings.ChatTemplate);
        Assert.Throws<InvalidDataException>(() => Manifest.Parse(json.Replace("ChatMl", "Other", StringComparison.Ordinal).AsMemory()));
    }

    private static FineTuneOptions Options(bool dialogues = false)
    {
        var options = Tiny.Options();
        (options.ChatTemplate, options.MaxLength) = (ChatTemplateKind.ChatMl, MaxLength);
        if (dialogues) options.LabelColumnName = null;
        return options;
    }

    private static IDataView Dialogues(MLContext ml, params string[] dialogues) => ml.Data.LoadFromEnumerable(dialogues.Select(d => new Row { Document = d }).ToList());

    private static string Json(params (string Role, string Content)[] messages) => JsonSerializer.Serialize(messages.Select(m => new { role = m.Role, content = m.Content }));
}
