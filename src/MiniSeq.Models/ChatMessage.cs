using System.Text.Json;

namespace MiniSeq.Models;

/// <summary>One turn of a dialogue, as in Hugging Face's <c>messages</c>.</summary>
/// <param name="Role">system, user or assistant.</param>
/// <param name="Content">Any text.</param>
public sealed record ChatMessage(string Role, string Content)
{
    /// <summary>The role of the text that tells the model how to behave.</summary>
    public const string System = "system";

    /// <summary>The role of the texts the model answers to.</summary>
    public const string User = "user";

    /// <summary>The role of the model's own texts.</summary>
    public const string Assistant = "assistant";

    /// <summary>Reads Hugging Face's <c>messages</c>: <c>[{"role": "user", "content": "…"}, …]</c>. Other properties of a message are passed over.</summary>
    /// <param name="json">The JSON text of one dialogue.</param>
    /// <exception cref="ArgumentException">It is not such a list, or a content is not text (lists of parts are not read).</exception>
    public static IReadOnlyList<ChatMessage> ParseMessages(string json)
    {
        ArgumentNullException.ThrowIfNull(json);
        try
        {
            using var document = JsonDocument.Parse(json);
            return document.RootElement.ValueKind == JsonValueKind.Array
                ? [.. document.RootElement.EnumerateArray().Select(Parse)]
                : throw new ArgumentException("A dialogue is a JSON list [{\"role\": \"user\", \"content\": \"…\"}, …]; this JSON is no list.", nameof(json));
        }
        catch (JsonException e)
        {
            throw new ArgumentException($"A dialogue is a JSON list [{{\"role\": \"user\", \"content\": \"…\"}}, …]; this text is no JSON: {e.Message}", nameof(json), e);
        }
    }

    private static ChatMessage Parse(JsonElement message, int index) => new(TextOf(message, "role", index), TextOf(message, "content", index));

    private static string TextOf(JsonElement message, string name, int index)
    {
        if (message.ValueKind != JsonValueKind.Object || !message.TryGetProperty(name, out var value) || value.ValueKind != JsonValueKind.String)
            throw new ArgumentException($"Message {index} of the dialogue has no \"{name}\" that is text.", nameof(message));
        try
        {
            return value.GetString()!;
        }
        catch (InvalidOperationException e) // an escape that is half of a surrogate pair
        {
            throw new ArgumentException($"Message {index} of the dialogue has a \"{name}\" that is no valid text.", nameof(message), e);
        }
    }
}
