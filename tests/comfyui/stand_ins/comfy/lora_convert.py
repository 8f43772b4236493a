def convert_lora(lora):
    return lora
