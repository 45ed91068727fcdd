package machine

import (
	"crypto/rand"
	"encoding/hex"
	mathrand "math/rand/v2"
)

var (
	adjectives = []string{"amber", "bold", "brisk", "calm", "clear", "coral", "deep", "eager", "fair", "fleet", "gentle", "glad", "green", "keen", "kind", "late", "light", "lucky", "mild", "neat", "noble", "pale", "proud", "quick", "quiet", "rapid", "salty", "sharp", "shy", "silver", "still", "sunny", "swift", "tidal", "vivid", "warm", "wide", "wise"}
	nouns      = []string{"anchovy", "atoll", "barracuda", "bonito", "cay", "clam", "cod", "conch", "crab", "current", "dolphin", "drift", "dune", "eel", "gull", "heron", "kelp", "lagoon", "limpet", "lobster", "manta", "marlin", "nautilus", "octopus", "otter", "palm", "pearl", "pelican", "petrel", "plover", "reef", "sardine", "seal", "shoal", "shrimp", "squid", "tern", "tide", "tuna", "turtle", "urchin", "whale"}
)

func madeUpName() string {
	return adjectives[mathrand.IntN(len(adjectives))] + "_" + nouns[mathrand.IntN(len(nouns))]
}

func newID() ID {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	return ID(hex.EncodeToString(b))
}
